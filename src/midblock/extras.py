"""Packages that only some commands need, and the one line that says what to install.

`pip install midblock` brings what the analyses use. A command that needs more imports its package when
it runs; where that fails, the program and `import midblock` ask `missing` which extra to install.
"""

from __future__ import annotations

from importlib.util import find_spec

from midblock.errors import MissingExtraError

__all__ = ["EXTRA_OF", "missing", "require"]

# imported name -> extra of pyproject.toml that installs it
EXTRA_OF = {
    "bitsandbytes": "quantized",
    "datasets": "tune",
    "lm_eval": "evaluate",
    "numba": "fast",
    "peft": "tune",
    "plotly": "report",
    "pyarrow": "parquet",
    "ray": "ray",
    "submitit": "slurm",
    "trl": "tune",
    "vllm": "vllm",
    "zstandard": "inspect",
}
# what needs more than the extra of the package that is missed first
_NEEDS = {"midblock sweep": "tune,evaluate", "midblock.sweep": "tune,evaluate", "midblock demo": "all",
          "midblock study": "all"}


def missing(error: ImportError, wanted_by: str) -> MissingExtraError | None:
    """The error to raise in place of a failed import of an optional package.

    Args:
        error: What the import raised.
        wanted_by: What the user asked for, as the message's first words (``midblock tune``, ``hf:NAME``).
    Returns:
        None where the missing module belongs to no extra: that is a bug, and keeps its traceback.

    Example:
        >>> print(missing(ModuleNotFoundError("No module named 'trl'", name="trl.trainer"), "midblock tune"))
        midblock tune needs the package trl, which is not installed: pip install 'midblock[tune]'
    """
    name = (error.name or "").partition(".")[0]
    extra = EXTRA_OF.get(name)
    if extra is None or not isinstance(error, ModuleNotFoundError):
        return None
    return MissingExtraError(f"{wanted_by} needs the package {name.replace('_', '-')}, which is not installed: "
                             f"pip install 'midblock[{_NEEDS.get(wanted_by, extra)}]'")


def require(module: str, wanted_by: str) -> None:
    """Stop at once where an optional package is absent, before work that would be lost.

    Raises:
        MissingExtraError: It is not installed.
    """
    if find_spec(module) is None:
        absent = missing(ModuleNotFoundError(f"No module named {module!r}", name=module), wanted_by)
        assert absent is not None, f"{module} belongs to no extra"
        raise absent
