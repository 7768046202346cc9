"""Measure where fine-tuning acts in a language model, tune only there, and prove the choice.

Models and data: `load_model`, `load_pair`, `load_chain`, `load_data`, `find_anatomy`, `segment_blocks`.

Where did tuning act? `profile` (and `profile_seeds`), `weights`, `lens`, `swap`, `gradients`, `merge`, `steer`,
`correlate`; all of a pair in one run: `study`.

Tune some blocks: `tune`; for a trainer of your own `make_plan`, `lora_config`, `FrozenPrefix`, `SupervisedHead`;
with several processes `RankSampler`.

Was it the right choice? `evaluate`, `evaluate_tasks`, `sweep`; without training `locate` (`validate` says what that is
worth), and learned `importance`, whose selections `overlap` compares.

Every result has `.frame` (a tidy data frame), `.summary()` (the answer first), `.answer()`, `.figures()`, and shows
itself in a notebook. The measures are pure functions in `metrics` and `stats`. On the command line each function is
``midblock NAME``.

Example:
    >>> import midblock
    >>> midblock.segment_blocks("01100", num_blocks=10)
    [2, 3, 4, 5]
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from midblock.lazily import on_first_use

__version__ = "0.1.0"

_MODULES = ("metrics", "stats")

if TYPE_CHECKING:
    from midblock.analysis.correlate import correlate as correlate
    from midblock.analysis.gradients import gradients as gradients
    from midblock.analysis.lens import lens as lens
    from midblock.analysis.merge import merge as merge
    from midblock.analysis.profile import profile as profile
    from midblock.analysis.stability import profile_seeds as profile_seeds
    from midblock.analysis.steer import steer as steer
    from midblock.analysis.swap import swap as swap
    from midblock.analysis.weights import weights as weights
    from midblock.data import load_data as load_data
    from midblock.evaluation import evaluate as evaluate
    from midblock.evaluation import evaluate_tasks as evaluate_tasks
    from midblock.models import find_anatomy as find_anatomy
    from midblock.models import load_chain as load_chain
    from midblock.models import load_model as load_model
    from midblock.models import load_pair as load_pair
    from midblock.report.study import study as study
    from midblock.segments import segment_blocks as segment_blocks
    from midblock.selection.ila import importance as importance
    from midblock.selection.locate import locate as locate
    from midblock.selection.overlap import overlap as overlap
    from midblock.selection.validate import validate as validate
    from midblock.sweeps import sweep as sweep
    from midblock.tuning import FrozenPrefix as FrozenPrefix
    from midblock.tuning import RankSampler as RankSampler
    from midblock.tuning import SupervisedHead as SupervisedHead
    from midblock.tuning import lora_config as lora_config
    from midblock.tuning import make_plan as make_plan
    from midblock.tuning import tune as tune

__all__ = [
    "FrozenPrefix",
    "RankSampler",
    "SupervisedHead",
    "__version__",
    "correlate",
    "evaluate",
    "evaluate_tasks",
    "find_anatomy",
    "gradients",
    "importance",
    "lens",
    "load_chain",
    "load_data",
    "load_model",
    "load_pair",
    "locate",
    "lora_config",
    "make_plan",
    "merge",
    "metrics",
    "overlap",
    "profile",
    "profile_seeds",
    "segment_blocks",
    "stats",
    "steer",
    "study",
    "swap",
    "sweep",
    "tune",
    "validate",
    "weights",
]

_get, __dir__ = on_first_use(__name__, __file__, __all__)


def __getattr__(name: str) -> Any:
    try:
        return importlib.import_module(f"midblock.{name}") if name in _MODULES else _get(name)
    except ModuleNotFoundError as error:
        from midblock import extras

        absent = extras.missing(error, f"midblock.{name}")
        if absent is None:
            raise
        raise absent from None
