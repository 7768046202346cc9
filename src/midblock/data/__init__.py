"""Data: where text comes from, how it reads, and how it becomes token rows and batches.

Usual way: `load_data` -> `tokenize` -> `make_batches`. `DATASETS` lists the names known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from midblock.data.arithmetic import generate_arithmetic
from midblock.data.augment import augment, augment_dataset
from midblock.data.examples import Dataset, Example, hold_out_part
from midblock.data.formats import answer_number
from midblock.data.registry import DATASETS, DatasetInfo
from midblock.data.sources import load_data
from midblock.data.tokens import TokenRow, TokenRows, pad_token_id, tokenize

if TYPE_CHECKING:
    from midblock.data.batches import Batch, make_batches

__all__ = ["DATASETS", "Batch", "Dataset", "DatasetInfo", "Example", "TokenRow", "TokenRows", "answer_number",
           "augment", "augment_dataset", "generate_arithmetic", "hold_out_part", "load_data", "make_batches",
           "pad_token_id", "tokenize"]


def __getattr__(name: str) -> Any:
    # batches need torch; the list of data sets (for --help) does not
    if name in ("Batch", "make_batches"):
        from midblock.data import batches

        return getattr(batches, name)
    raise AttributeError(f"module 'midblock.data' has no attribute {name!r}")
