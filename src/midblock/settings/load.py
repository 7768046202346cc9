"""How checkpoints are loaded: shared by every command that loads one."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import model_validator

from midblock.settings.base import Settings, name_of, setting

__all__ = ["STREAM_FIELDS", "ChainLoadSettings", "DtypeName", "LoadSettings", "PlaceSettings",
           "StreamedChainSettings", "StreamedLoadSettings", "TrustSettings"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class PlaceSettings(Settings):
    """Where a model computes, in which dtype, and how its weights are held."""

    dtype: DtypeName = setting("auto", help=(
        "dtype of the weights. auto: the fastest on this device that holds every checkpoint "
        "(on a CPU bfloat16 only where it is faster than float32)."))
    device: str = setting("auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")
    device_map: Literal["auto"] | None = setting(None, help=(
        "auto: spread the blocks over all GPUs (of one model that no GPU holds alone)."))
    load_4bit: bool = setting(False, help="Hold the weights in 4 bit (NF4; needs bitsandbytes).")
    load_8bit: bool = setting(False, help="Hold the weights in 8 bit (LLM.int8; needs bitsandbytes).")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.load_4bit and self.load_8bit:
            raise ValueError(f"{name_of('load_4bit')} and {name_of('load_8bit')} exclude each other; choose one")
        if self.device_map is not None and self.device != "auto":
            raise ValueError(f"{name_of('device_map')} chooses the devices itself; leave out {name_of('device')} "
                             f"{self.device}")
        return self

    @property
    def bits(self) -> int | None:
        """Of quantised weights; None: they are not."""
        return 4 if self.load_4bit else 8 if self.load_8bit else None

    def placement(self) -> dict[str, Any]:
        """The keywords of `midblock.load_model` that say where and in which dtype."""
        return {name: getattr(self, name) for name in PlaceSettings.model_fields}


class TrustSettings(Settings):
    """What a model's files may do: run code of their own."""

    trust_remote_code: bool = setting(
        False, help="Run Python code that comes with the model. Only if you trust its author.")
    allow_pickle: bool = setting(
        False, help="Load pickle checkpoints (*.bin), which can run code. Only if you trust their author.")


class LoadSettings(TrustSettings, PlaceSettings):
    """dtype, devices, quantisation and trust: keywords of `midblock.load_model` and `midblock.load_chain`."""


class ChainLoadSettings(LoadSettings):
    """For a chain of stages that share one tokenizer."""

    tokenizer: Literal["own", "base"] = setting(
        "own", help="own: checkpoints whose tokenizers differ are refused; base: the first one's is used for all.")


class StreamSettings(Settings):
    """For models that may be larger than memory."""

    stream: Literal["auto", "always", "never"] = setting("auto", help=(
        "Read the blocks one after another from the files in each pass, so that two of them are in memory, not "
        "models. auto: where whole models do not fit; says why."))
    memory_limit: int | str | None = setting(None, metavar="SIZE", help=(
        "Memory that the program may take in all, such as 16GB: it decides auto, and what of a streamed pass goes to "
        "disk."))
    scratch: str | None = setting(None, metavar="DIR", help=(
        "Folder for hidden states of a streamed pass that do not fit into memory. Default: that of temporary files."))


class StreamedChainSettings(StreamSettings, ChainLoadSettings):
    """For a chain of stages whose passes can be streamed: keywords of `midblock.load_chain`."""


class StreamedLoadSettings(StreamSettings, LoadSettings):
    """The same for a single model."""


STREAM_FIELDS = tuple(StreamSettings.model_fields)
"""Settings that change where weights are while a pass runs, and no result."""
