"""Scoring through vLLM in place of the model in memory: lm-evaluation-harness's own vLLM model.

For generation on GPUs with models of several billion parameters. Items, tasks and files are those of the model in
memory; answers are vLLM's, whose kernels round otherwise.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from midblock.errors import SettingsError
from midblock.extras import require
from midblock.models.checkpoints import fingerprint, is_adapter_folder
from midblock.models.resolve import resolve_checkpoint
from midblock.models.validation import read_adapter_config
from midblock.settings.base import name_of
from midblock.settings.load import LoadSettings
from midblock.writing import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["VllmModel", "open_in_vllm"]


@dataclass
class VllmModel:
    """A checkpoint that vLLM runs; its weights are read when the first task is scored."""

    spec: str
    """The MODEL spec as it was given."""
    name: str
    folder: Path
    adapter: Path | None
    tokenizer: PreTrainedTokenizerBase
    options: dict[str, Any]
    """Of lm-eval's ``VLLM``."""
    _lm: Any = field(default=None, repr=False)

    def describe(self) -> dict[str, Any]:
        """What run.json keeps of it."""
        parts = [fingerprint(f) for f in (self.folder, self.adapter) if f is not None]
        return {"spec": self.spec, "name": self.name, "backend": "vllm",
                "fingerprint": parts[0] if len(parts) == 1 else sha256_of(*parts),
                "dtype": self.options["dtype"], "adapter": None if self.adapter is None else str(self.adapter)}

    def lm(self) -> Any:
        """lm-eval's model, made once for all tasks.

        Raises:
            MissingExtraError: vLLM is not installed.
            SettingsError: vLLM does not take the model.
        """
        if self._lm is None:
            require("vllm", f"{name_of('backend')} vllm")
            from lm_eval.models.vllm_causallms import VLLM

            try:
                self._lm = VLLM(**self.options)
            except (ValueError, RuntimeError, NotImplementedError, AssertionError) as error:
                raise SettingsError(f"vLLM does not run {self.spec}: {' '.join(str(error).split())[:400]}") from None
        return self._lm

    def close(self) -> None:
        """Give the memory back, for the next model."""
        self._lm = None
        gc.collect()


def open_in_vllm(spec: str, *, adapter: str | None, load: LoadSettings, tensor_parallel: int) -> VllmModel:
    """A model, or an adapter on its base, for vLLM; nothing is loaded yet.

    Args:
        spec: A MODEL spec; a folder of an adapter stands for it on its base.
        adapter: Folder or hub id of an adapter.
        load: Its dtype and what is trusted; devices are vLLM's own affair.
        tensor_parallel: GPUs that share the weights.

    Raises:
        SettingsError: an adapter that vLLM does not serve, or an option that it does not have.
        ModelNotFoundError: as `midblock.load_model`.
    """
    from midblock.models.adapters import base_of_adapter
    from midblock.models.tokenizers import load_tokenizer

    if load.load_4bit or load.load_8bit or load.device_map or load.device != "auto":
        raise SettingsError(f"{name_of('backend')} vllm places and quantises weights itself; leave out "
                            f"{name_of('device')}, {name_of('device_map')}, {name_of('load_4bit')} and "
                            f"{name_of('load_8bit')}.")
    trust: dict[str, Any] = {"allow_pickle": load.allow_pickle, "trust_remote_code": load.trust_remote_code}
    folder = resolve_checkpoint(spec, **trust)
    tuned: Path | None = None
    if is_adapter_folder(folder):
        if adapter is not None:
            raise SettingsError(f"model {spec!r} is itself an adapter; give its base as MODEL, and one adapter.")
        tuned, folder = folder, base_of_adapter(folder, **trust)
    elif adapter is not None:
        tuned = resolve_checkpoint(adapter, allow_pickle=load.allow_pickle)
    options: dict[str, Any] = {
        "pretrained": str(folder), "dtype": load.dtype, "trust_remote_code": load.trust_remote_code,
        "tensor_parallel_size": tensor_parallel, "batch_size": "auto"}
    if tuned is not None:
        options |= {"lora_local_path": str(tuned), "max_lora_rank": _rank(tuned)}
    return VllmModel(spec, (tuned or Path(spec)).name, folder, tuned,
                     load_tokenizer(folder, spec=spec, trust_remote_code=load.trust_remote_code), options)


def _rank(adapter: Path) -> int:
    """The ``max_lora_rank`` that an adapter needs.

    Raises:
        SettingsError: vLLM serves no such adapter.
    """
    from midblock.models.adapters import VLLM_RANKS

    config = read_adapter_config(adapter / "adapter_config.json")
    rank = max([int(config.get("r") or 0), *map(int, (config.get("rank_pattern") or {}).values())])
    fitting = next((r for r in VLLM_RANKS if r >= rank), None)
    why = ("it is a DoRA" if config.get("use_dora") else "it adapts stacked experts" if config.get("target_parameters")
           else f"its rank {rank} is above {VLLM_RANKS[-1]}" if fitting is None else None)
    if why is not None:
        raise SettingsError(f"vLLM does not serve the adapter {adapter}: {why}. Merge it (midblock tune --merge) and "
                            "score the folder of the merged model.")
    assert fitting is not None
    return fitting
