"""Settings of `midblock lens`."""

from __future__ import annotations

from midblock.settings import sampling
from midblock.settings.base import setting
from midblock.settings.token_means import TokenMeanSettings

__all__ = ["LensSettings"]


class LensSettings(TokenMeanSettings):
    """What is unembedded and scored; `lens` takes the same names as keyword arguments."""

    samples: int = sampling.samples(100, "Samples (the paper: 100 at the token level).")
    top_k: int = setting(10, ge=1, metavar="K", help="Size of the lists whose overlap is measured.")
    every: int = setting(1, ge=1, metavar="N", help="Unembed every n-th hidden state (the last one always).")
    trace: int = setting(0, ge=0, metavar="N", help=(
        "For this many samples, keep the most likely token at every depth (trace.csv)."))
    difference_tokens: int = setting(5, ge=0, metavar="K", help=(
        "Tokens that the mean difference of two checkpoints speaks for at every depth (difference_tokens.csv)."))
    kl_tokens: int = setting(20, ge=0, metavar="N", help=(
        "Tokens of the data at which two checkpoints' predictions differ most (kl_tokens.csv)."))
    paper_code: bool = setting(False, old=("earlier_code",), help=(
        "Also unembed the last hidden state normed twice, as the paper's public code does."))
