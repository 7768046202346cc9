"""Settings of `midblock study`."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import model_validator

from midblock.settings import sampling
from midblock.settings.base import Settings, name_of, setting

__all__ = ["PARTS", "Part", "StudySettings"]

Part = Literal["weights", "profile", "lens", "swap", "gradients", "locate", "correlate", "sweep"]
PARTS: tuple[Part, ...] = get_args(Part)
"""Parts of a study, in the order in which they run."""


class StudySettings(Settings):
    """What a study measures; `study` takes the same names as keyword arguments."""

    only: tuple[Part, ...] = setting((), metavar="PART,...", help=f"Run only these parts: {', '.join(PARTS)}.")
    skip: tuple[Part, ...] = setting((), metavar="PART,...", help="Leave these parts out.")
    sweep: tuple[str, ...] = setting((), metavar="FILE,...", help="Also run these sweeps, after the analyses.")
    token_data: tuple[str, ...] = setting((), metavar="D,...", help=(
        "Measure only these of the data sets token by token (token level, lens, swap, gradients, locate), of the "
        "others the pooled level alone. Default: all."))
    samples: int = sampling.samples(200, "Samples of the profile's pooled level (the paper: 1,000).", least=2)
    token_samples: int = setting(50, ge=1, metavar="N", help="Samples of its token level (the paper: 100).")
    lens_samples: int = setting(50, ge=1, metavar="N", help="Samples of the logit lens.")
    swap_samples: int = setting(32, ge=2, metavar="N", help="Samples of the swap.")
    gradient_samples: int = setting(16, ge=4, metavar="N", help="Samples of the backward passes and of locate.")
    segments: int = setting(5, ge=1, metavar="K", help="Number of equal depth segments that are swapped.")
    swap_depth: int | None = setting(None, ge=1, metavar="N", help=(
        "Swap only the last N blocks of each segment, as the paper's public code does."))
    rotations: bool = setting(False, help=(
        "Also how tuning turned the weights: singular vectors kept, intruder dimensions, entries unchanged (minutes)."))
    paper_code: bool = setting(False, help="Profile and lens with the formulas of the paper's public code.")
    max_length: int = sampling.max_length(256, least=3)
    batch_size: int = sampling.batch_size()
    seed: int = sampling.seed()

    @model_validator(mode="after")
    def _some_part(self) -> StudySettings:
        if not self.parts:
            raise ValueError(f"{name_of('only')} and {name_of('skip')} leave no part; there are {', '.join(PARTS)}"
                             + ("" if self.sweep else f" ({'sweep'} needs {name_of('sweep')})"))
        return self

    @property
    def parts(self) -> tuple[Part, ...]:
        """The parts that run, in their order."""
        return tuple(p for p in PARTS if (not self.only or p in self.only) and p not in self.skip
                     and (p != "sweep" or self.sweep))
