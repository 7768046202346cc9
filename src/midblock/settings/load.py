"""How checkpoints are loaded: shared by every command that loads one."""

from __future__ import annotations

from typing import Literal

from midblock.settings.base import Settings, setting

__all__ = ["ChainLoadSettings", "DtypeName", "LoadSettings", "PlaceSettings", "TrustSettings"]

DtypeName = Literal["auto", "float32", "bfloat16", "float16"]


class PlaceSettings(Settings):
    """Where a model computes, and in which dtype."""

    dtype: DtypeName = setting("auto", help=(
        "dtype of the weights. auto: the fastest on this device that holds every checkpoint "
        "(on a CPU bfloat16 only where it is faster than float32)."))
    device: str = setting("auto", metavar="DEVICE", help="auto, cpu, cuda, cuda:1, mps.")


class TrustSettings(Settings):
    """What a model's files may do: run code of their own."""

    trust_remote_code: bool = setting(
        False, help="Run Python code that comes with the model. Only if you trust its author.")
    allow_pickle: bool = setting(
        False, help="Load pickle checkpoints (*.bin), which can run code. Only if you trust their author.")


class LoadSettings(TrustSettings, PlaceSettings):
    """dtype, device and trust: keywords of `midblock.load_model` and `midblock.load_chain`."""


class ChainLoadSettings(LoadSettings):
    """For a chain of stages that share one tokenizer."""

    tokenizer: Literal["own", "base"] = setting(
        "own", help="own: checkpoints whose tokenizers differ are refused; base: the first one's is used for all.")
