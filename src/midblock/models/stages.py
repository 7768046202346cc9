"""Names of the checkpoints of a chain, and which of them are compared (no model is needed to know that)."""

from __future__ import annotations

from collections.abc import Sequence

from midblock.errors import SettingsError

__all__ = ["comparisons", "side_of", "stage_names"]

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
