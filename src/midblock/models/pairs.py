"""Published base and tuned checkpoints, and what each tuned one was trained with.

A comparison of base and tuned weights shows the effect of *supervised* fine-tuning only where
nothing else was done in between. The paper (its table 3) keeps OLMo-2 and Mistral-7B v0.1 for
that reason; `pair_warning` says so wherever another pair is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePath

__all__ = ["KnownPair", "known_pairs", "pair_warning", "stages_of"]


@dataclass(frozen=True, slots=True)
class KnownPair:
    """One tuned checkpoint and the base it came from."""

    family: str
    base: str
    """Hub id of the base."""
    tuned: str | None
    """Hub id of the tuned checkpoint; None where the family published none from this base."""
    stage: str
    """The last stage of the tuned one: ``sft``, ``dpo``, ``rlvr``, ``rlhf``, ``mixed`` or ``none``."""
    pipeline: str
    """All stages between base and tuned, as its makers report them."""
    suitable: bool
    """Whether the difference of the two is supervised fine-tuning alone."""

    @property
    def warning(self) -> str | None:
        """Why this pair does not isolate supervised fine-tuning; None where it does."""
        if self.suitable:
            return None
        if self.tuned is None:
            return (f"{self.base}: the {self.family} family published no checkpoint tuned from it; a tuned "
                    "copy must come from elsewhere.")
        return (f"{self.tuned} is not {self.base} after supervised fine-tuning alone (pipeline: "
                f"{self.pipeline}); the changes measured mix these stages.{_alternative(self)}")


def _alternative(pair: KnownPair) -> str:
    pure = next((p.tuned for p in _PAIRS if p.base == pair.base and p.suitable), None)
    return f" For supervised fine-tuning alone use {pure}." if pure else ""


def _olmo2(base: str) -> list[KnownPair]:
    return [
        KnownPair("OLMo-2", base, f"{base}-SFT", "sft", "SFT", True),
        KnownPair("OLMo-2", base, f"{base}-DPO", "dpo", "SFT + DPO", False),
        KnownPair("OLMo-2", base, f"{base}-Instruct", "rlvr", "SFT + DPO + RLVR", False),
    ]


def _mixed(family: str, stage: str, pipeline: str, *pairs: tuple[str, str]) -> list[KnownPair]:
    return [KnownPair(family, base, tuned, stage, pipeline, False) for base, tuned in pairs]


def _suffixed(stem: str, sizes: tuple[str, ...], base_end: str,
              tuned_end: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{stem}{size}{base_end}", f"{stem}{size}{tuned_end}") for size in sizes)


# Sources: the paper's table 3 for the family's class; the stages themselves from each family's
# technical report or model card. The table names OLMo-2-Instruct as pure SFT; by its model card
# that one went on through DPO and RLVR, and the checkpoint after SFT alone is OLMo-2-...-SFT.
_PAIRS: tuple[KnownPair, ...] = (
    *_olmo2("allenai/OLMo-2-0425-1B"),
    *_olmo2("allenai/OLMo-2-1124-7B"),
    *_olmo2("allenai/OLMo-2-1124-13B"),
    *_olmo2("allenai/OLMo-2-0325-32B"),
    KnownPair("Mistral", "mistralai/Mistral-7B-v0.1", "mistralai/Mistral-7B-Instruct-v0.1", "sft", "SFT",
              True),
    *_mixed("Mistral", "mixed", "tuning not described in full",
            ("mistral-community/Mistral-7B-v0.2", "mistralai/Mistral-7B-Instruct-v0.2"),
            ("mistralai/Mistral-7B-v0.3", "mistralai/Mistral-7B-Instruct-v0.3")),
    *_mixed("LLaMA 2", "rlhf", "SFT + RLHF (rejection sampling, PPO)",
            *_suffixed("meta-llama/Llama-2-", ("7b", "13b", "70b"), "-hf", "-chat-hf")),
    *_mixed("LLaMA 3", "rlhf", "SFT + rejection sampling + PPO + DPO",
            *_suffixed("meta-llama/Meta-Llama-3-", ("8B", "70B"), "", "-Instruct")),
    *_mixed("LLaMA 3", "dpo", "SFT + rejection sampling + DPO",
            *_suffixed("meta-llama/Llama-3.1-", ("8B", "70B"), "", "-Instruct"),
            *_suffixed("meta-llama/Llama-3.2-", ("1B", "3B"), "", "-Instruct")),
    *_mixed("Gemma 1", "rlhf", "SFT + RLHF", *_suffixed("google/gemma-", ("2b", "7b"), "", "-it")),
    *_mixed("Gemma 2", "rlhf", "SFT + RLHF", *_suffixed("google/gemma-2-", ("2b", "9b", "27b"), "", "-it")),
    *_mixed("Qwen 1.5", "dpo", "SFT + DPO",
            *_suffixed("Qwen/Qwen1.5-", ("0.5B", "1.8B", "4B", "7B", "14B", "32B", "72B"), "", "-Chat")),
    *_mixed("Qwen 2", "dpo", "SFT + DPO",
            *_suffixed("Qwen/Qwen2-", ("0.5B", "1.5B", "7B", "72B"), "", "-Instruct")),
    *_mixed("Qwen 2.5", "rlhf", "SFT + DPO + GRPO",
            *_suffixed("Qwen/Qwen2.5-", ("0.5B", "1.5B", "3B", "7B", "14B", "32B", "72B"), "", "-Instruct")),
    *_mixed("DeepSeek", "dpo", "SFT + DPO",
            *_suffixed("deepseek-ai/deepseek-llm-", ("7b", "67b"), "-base", "-chat")),
    *_mixed("DeepSeek", "rlhf", "SFT + RLHF (GRPO)",
            ("deepseek-ai/DeepSeek-V2", "deepseek-ai/DeepSeek-V2-Chat"),
            ("deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V2-Lite-Chat")),
    *_mixed("Falcon", "mixed", "mixed chat and instruction data; the paper counts it as unpaired",
            *_suffixed("tiiuae/falcon-", ("7b", "40b"), "", "-instruct")),
    *_mixed("SmolLM2", "dpo", "SFT + DPO",
            *_suffixed("HuggingFaceTB/SmolLM2-", ("135M", "360M", "1.7B"), "", "-Instruct")),
    *(KnownPair("Pythia", f"EleutherAI/pythia-{size}", None, "none", "base only", False)
      for size in ("70m", "160m", "410m", "1b", "1.4b", "2.8b", "6.9b", "12b")),
    *_mixed("OPT", "mixed", "instruction meta-learning (OPT-IML) on a mixture of NLP tasks",
            ("facebook/opt-1.3b", "facebook/opt-iml-1.3b"), ("facebook/opt-30b", "facebook/opt-iml-30b")),
    *(KnownPair("OPT", f"facebook/opt-{size}", None, "none", "base only", False)
      for size in ("125m", "350m", "2.7b", "6.7b", "13b", "66b")),
)


def known_pairs(family: str | None = None) -> list[KnownPair]:
    """The registry, the pairs that isolate supervised fine-tuning first.

    Args:
        family: Only families whose name contains this (any case).

    Example:
        >>> [p.tuned for p in known_pairs("mistral") if p.suitable]
        ['mistralai/Mistral-7B-Instruct-v0.1']
    """
    chosen = [p for p in _PAIRS if family is None or family.lower() in p.family.lower()]
    return sorted(chosen, key=lambda p: not p.suitable)


def stages_of(base: str) -> list[str]:
    """The base and its published stages in the order of training, for a chain; empty if unknown.

    Example:
        >>> [s.rpartition("-")[2] for s in stages_of("allenai/OLMo-2-0425-1B")]
        ['1B', 'SFT', 'DPO', 'Instruct']
    """
    own = [p for p in _PAIRS if _key(p.base) == _key(base) and p.tuned is not None]
    return [own[0].base, *(p.tuned for p in own if p.tuned is not None)] if own else []


def _key(spec: str) -> str:
    """What a hub id and a folder with a copy of it have in common: the last part, any case."""
    name = PurePath(str(spec).rstrip("/\\").replace("\\", "/")).name.lower()
    # a snapshot folder of the hub cache: models--owner--name/snapshots/<commit>
    snapshot = re.search(r"models--[^/]+?--([^/]+)/snapshots/[0-9a-f]+/?$", str(spec).lower())
    return snapshot.group(1) if snapshot else name


def pair_warning(base_spec: str, sft_spec: str) -> str | None:
    """Why two checkpoints do not show supervised fine-tuning alone; None if they do or are unknown.

    Checkpoints are recognised by the last part of their name, so local copies count too.

    Example:
        >>> pair_warning("allenai/OLMo-2-0425-1B", "allenai/OLMo-2-0425-1B-SFT") is None
        True
        >>> print(pair_warning("google/gemma-2b", "google/gemma-2b-it"))
        google/gemma-2b-it is not google/gemma-2b after supervised fine-tuning alone (pipeline: \
SFT + RLHF); the changes measured mix these stages.
    """
    base, tuned = _key(base_spec), _key(sft_spec)
    by_tuned = [p for p in _PAIRS if p.tuned is not None and _key(p.tuned) == tuned]
    if by_tuned:
        own = [p for p in by_tuned if _key(p.base) == base]
        if own:
            return own[0].warning
        bases = {_key(p.base) for p in _PAIRS} | {_key(p.tuned) for p in _PAIRS if p.tuned}
        if base in bases:
            return (f"{by_tuned[0].tuned} was tuned from {by_tuned[0].base}, not from {base_spec}; what is "
                    "measured is not the effect of its tuning alone.")
        return by_tuned[0].warning
    tuned_base = [p for p in _PAIRS if p.tuned is not None and _key(p.tuned) == base]
    if tuned_base:
        return (f"{base_spec} is itself tuned ({tuned_base[0].pipeline}); what is measured is tuning on top "
                "of that, not of a pretrained base.")
    return None
