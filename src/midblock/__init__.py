"""Measure where fine-tuning acts in a language model, tune only there, and prove the choice."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# name -> module that defines it; resolved on first use so that importing midblock stays light
_EXPORTS = {
    "load_model": "midblock.models",
    "load_pair": "midblock.models",
    "load_chain": "midblock.models",
    "find_anatomy": "midblock.models",
    "load_data": "midblock.data",
    "segment_blocks": "midblock.segments",
    "profile": "midblock.analysis.profile",
    "profile_seeds": "midblock.analysis.stability",
    "weights": "midblock.analysis.weights",
    "lens": "midblock.analysis.lens",
    "swap": "midblock.analysis.swap",
    "merge": "midblock.analysis.merge",
    "gradients": "midblock.analysis.gradients",
    "steer": "midblock.analysis.steer",
    "correlate": "midblock.analysis.correlate",
    "tune": "midblock.tuning",
    "make_plan": "midblock.tuning",
    "lora_config": "midblock.tuning",
    "FrozenPrefix": "midblock.tuning",
    "SupervisedHead": "midblock.tuning",
    "evaluate": "midblock.evaluation",
    "evaluate_tasks": "midblock.evaluation",
    "importance": "midblock.selection.ila",
    "locate": "midblock.selection.locate",
    "overlap": "midblock.selection.overlap",
    "validate": "midblock.selection.validate",
    "sweep": "midblock.sweeps",
    "study": "midblock.report.study",
}
_MODULES = ("metrics", "stats")

__all__ = ["__version__", *_EXPORTS, *_MODULES]

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
    from midblock.tuning import SupervisedHead as SupervisedHead
    from midblock.tuning import lora_config as lora_config
    from midblock.tuning import make_plan as make_plan
    from midblock.tuning import tune as tune


def __getattr__(name: str) -> Any:
    try:
        if name in _EXPORTS:
            return getattr(importlib.import_module(_EXPORTS[name]), name)
        if name in _MODULES:
            return importlib.import_module(f"midblock.{name}")
    except ModuleNotFoundError as error:
        from midblock import extras

        absent = extras.missing(error, f"midblock.{name}")
        if absent is None:
            raise
        raise absent from None
    raise AttributeError(f"module 'midblock' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
