"""A chain of checkpoints (base, SFT, DPO, RLVR ...) and which of them are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from midblock.errors import SettingsError
from midblock.models import LoadedModel, check_fit, load_chain, load_model

__all__ = ["comparisons", "resolve_stages", "side_of", "stage_names"]

_DEFAULT_NAMES = ("base", "sft", "dpo", "rlvr")


def stage_names(count: int, names: Sequence[str] | None = None) -> list[str]:
    """Names of ``count`` stages: the given ones, else base, sft, dpo, rlvr, stage5 ...

    Raises:
        SettingsError: the wrong number of names, a repeated name, or one with ``|`` in it.

    Example:
        >>> stage_names(2)
        ['base', 'sft']
    """
    if names is None:
        return [*_DEFAULT_NAMES, *(f"stage{i}" for i in range(5, count + 1))][:count]
    if len(names) != count or len(set(names)) != count or any("|" in n or not n for n in names):
        raise SettingsError(f"{count} checkpoints need {count} different stage names without '|'; "
                            f"got {list(names)}.")
    return list(names)


def comparisons(names: Sequence[str]) -> list[tuple[str, str]]:
    """(later, earlier) pairs: each stage with the first and with the one before.

    Example:
        >>> comparisons(["base", "sft", "dpo"])
        [('sft', 'base'), ('dpo', 'base'), ('dpo', 'sft')]
    """
    pairs = []
    for i in range(1, len(names)):
        pairs.append((names[i], names[0]))
        if i > 1:
            pairs.append((names[i], names[i - 1]))
    return pairs


def side_of(pair: tuple[str, str]) -> str:
    """The ``stage`` cell of a comparison: ``sft-base``."""
    return f"{pair[0]}-{pair[1]}"


def resolve_stages(stages: Sequence[LoadedModel | str] | LoadedModel | str, sft: LoadedModel | str | None,
                   names: Sequence[str] | None, *, least: int = 2) -> list[LoadedModel]:
    """Loaded models of a chain given as models, specs, or a base and a tuned one.

    Raises:
        SettingsError: fewer than ``least``.
        PairMismatchError: they do not fit together.
    """
    chain: list[Any] = list(stages) if isinstance(stages, Sequence) and not isinstance(stages, str) else [stages]
    if sft is not None:
        chain.append(sft)
    if len(chain) < least:
        raise SettingsError("at least two checkpoints are compared: give a base and a tuned one.")
    if all(isinstance(m, str) for m in chain):
        return load_chain(chain, names=names)
    dtype = next(m.dtype for m in chain if not isinstance(m, str))
    loaded = [load_model(m, dtype=dtype) if isinstance(m, str) else m for m in chain]
    check_fit(loaded)
    return loaded
