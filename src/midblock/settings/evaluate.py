"""Settings of `midblock evaluate`."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from midblock.settings.base import Settings, name_of, setting
from midblock.settings.sampling import samples, seed

__all__ = ["EvaluateSettings", "ScoringSettings", "ServingSettings"]


class ScoringSettings(Settings):
    """How one model is scored on a task; `evaluate` takes the same names as keyword arguments."""

    samples: int | None = samples(None, "Rows to draw from the data (all if unset); the same for every model.")
    seed: int = seed("Seed of the draw and of the choice of few-shot examples.")
    batch_size: int | None = setting(None, ge=1, metavar="N", help=(
        "Rows in a batch (8 to 64 by kind of task). In float32 no score depends on it."))
    max_new_tokens: int | None = setting(None, ge=1, metavar="N", help=(
        "Longest answer in tokens (gsm8k 256, arithmetic 96, humaneval 512, ifeval 1280)."))
    max_length: int | None = setting(None, ge=2, metavar="TOKENS", help=(
        "Perplexity and answer_loss: cut rows after this many tokens (1024 or the model's limit)."))
    shots: int = setting(0, ge=0, metavar="N", help=(
        "Few-shot examples from the train split, for exact match and multiple choice."))
    chat: bool = setting(False, help="Use the tokenizer's chat template.")
    allow_code_execution: bool = setting(False, help=(
        "humaneval: run what the model writes, in a sandbox (refused where the system gives no full one)."))
    allow_unsandboxed_code: bool = setting(False, help=(
        "humaneval: run what the model writes also where the system gives no full sandbox. Only in a machine made "
        "for that."))


class EvaluateSettings(ScoringSettings):
    """What is scored and what it is compared with; `evaluate_tasks` takes the same names as keyword arguments."""

    adapter: str | None = setting(None, metavar="A", help="Folder or hub id of a PEFT adapter of MODEL.")
    data: str | None = setting(None, metavar="D", help=(
        "Data in place of the task's own: a registry name, a local file, hf:NAME[:SPLIT]."))
    compare_base: bool = setting(False, help=(
        "Also score MODEL without its adapter on the same items, and show the difference."))
    base: str | None = setting(None, metavar="MODEL", help=(
        "Compare with this model instead (for a tuned model that is no adapter)."))

    backend: Literal["midblock", "vllm"] = setting("midblock", help=(
        "midblock: the model in memory, exact; vllm: lm-eval's vLLM, for generation with large models on GPUs (an "
        "adapter is served as it is, or give the merged model)."))
    tensor_parallel: int = setting(1, ge=1, le=64, metavar="N", help="GPUs that share the weights (backend vllm).")

    @model_validator(mode="after")
    def _one_base(self) -> EvaluateSettings:
        if self.compare_base and self.base is not None:
            raise ValueError(f"give {name_of('compare_base')} or {name_of('base')}, not both")
        return self

    def scoring(self, **overrides: object) -> ScoringSettings:
        """The part that `evaluate` takes, with some fields replaced."""
        return ScoringSettings(**{**{n: getattr(self, n) for n in ScoringSettings.model_fields}, **overrides})


class ServingSettings(Settings):
    """How a server is asked; `check_serving` takes the same names as keyword arguments."""

    served_name: str | None = setting(None, metavar="NAME", help=(
        "The server's name of the model with the adapter; needed where it serves several."))
    serving_data: str = setting("pydocs", metavar="D", help="Texts whose log-probabilities are compared.")
    serving_samples: int = setting(16, ge=2, le=10_000, metavar="N", help="How many texts.")
    serving_tokens: int = setting(64, ge=4, metavar="TOKENS", help="Cut the texts after this many tokens.")
    timeout: float = setting(60.0, gt=0, cli=False, help="Seconds to wait for one answer.")
