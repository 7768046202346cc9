"""Every error a user can cause, as one family.

The command line turns a `MidblockError` into one clear line and exit code 2; anything
else is a bug and keeps its traceback. A message says what was asked, what was found and
what to do about it.
"""

from __future__ import annotations

__all__ = [
    "AdapterError",
    "ArchitectureError",
    "BlockRangeError",
    "BudgetError",
    "CacheRefusedError",
    "CheckpointError",
    "DataError",
    "MidblockError",
    "MissingExtraError",
    "ModelNotFoundError",
    "OutputError",
    "PairMismatchError",
    "PeerError",
    "ServingError",
    "SettingsError",
    "TrainingError",
    "UndefinedMetricError",
    "UnsafeCheckpointError",
]


class MidblockError(Exception):
    """Base of every error that a user can cause and mend."""

    exit_code = 2


class SettingsError(MidblockError, ValueError):
    """An option or a configuration key has a value that cannot be used."""


class ModelNotFoundError(MidblockError):
    """A MODEL spec names nothing that can be loaded."""


class CheckpointError(MidblockError):
    """A checkpoint is truncated, corrupt, incomplete, or holds NaN or infinity."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint would run code on loading (pickle, remote code) and nobody asked for it."""


class ArchitectureError(MidblockError):
    """The module tree of a model does not show blocks, embeddings, norm or head."""


class PairMismatchError(MidblockError):
    """Base and tuned checkpoint are not of one architecture, size or tokenizer."""


class PeerError(MidblockError):
    """Another process of the same job (``torchrun``, ``accelerate launch``) has ended or cannot be reached."""

    exit_code = 1


class BlockRangeError(SettingsError):
    """A mask or range of blocks does not fit the model."""


class BudgetError(SettingsError):
    """A parameter budget cannot be met (smaller than rank 1, or larger than full rank)."""


class DataError(MidblockError):
    """A data set is missing, empty, or a row lacks what is needed (file and line named)."""


class OutputError(MidblockError):
    """A run folder is not empty, not resumable, or cannot be written (disk full)."""


class AdapterError(MidblockError):
    """A PEFT adapter does not belong to the model it was given with, or failed its check."""


class CacheRefusedError(MidblockError):
    """The prefix cache cannot be exact here (dropout, noise, packing) and says why."""


class MissingExtraError(MidblockError, ImportError):
    """A package that only some commands need is not installed (its extra is named)."""


class TrainingError(MidblockError):
    """Training cannot go on (the loss became non-finite, say); the last good state is kept."""


class UndefinedMetricError(MidblockError, ArithmeticError):
    """A quantity has no value for this input (all singular values 0, say).

    Only the measuring loop catches it: it stores an empty cell and the reason.
    """


class ServingError(MidblockError):
    """A server cannot be reached, or does not answer as OpenAI's completions API does."""
