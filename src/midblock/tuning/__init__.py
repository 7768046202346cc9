"""Mid-Block tuning: plans, the frozen prefix, training, checks and exports (room 5).

Usual way: `tune`, or step by step `make_plan` -> `attach` -> `train` -> `check_engagement` ->
`export_adapter`. For a trainer of one's own: `lora_config` and `FrozenPrefix`. PEFT is imported when something is
attached, TRL when something is trained.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from midblock.lazily import on_first_use

if TYPE_CHECKING:
    from midblock.settings.tune import PlanSettings, TrainSettings, TuneSettings
    from midblock.tuning.adapter import Attachment, attach
    from midblock.tuning.batching import RankSampler
    from midblock.tuning.cache import PrefixCache
    from midblock.tuning.check import EngagementReport, check_engagement, frozen_digests, require_gradients
    from midblock.tuning.export import export_adapter, merged_weights, save_merged, vllm_note, with_weights
    from midblock.tuning.peft_config import lora_config
    from midblock.tuning.plan import ModulePlan, Plan, load_plan
    from midblock.tuning.planning import (
        budget_of,
        full_blocks_for_budget,
        make_plan,
        random_block_set,
        require_plan_fits,
    )
    from midblock.tuning.prefix import FrozenPrefix
    from midblock.tuning.run import TuneResult, tune
    from midblock.tuning.steps import StepLog, TrainResult
    from midblock.tuning.supervised_head import SupervisedHead
    from midblock.tuning.trainer import train

__all__ = ["Attachment", "EngagementReport", "FrozenPrefix", "ModulePlan", "Plan", "PlanSettings", "PrefixCache",
           "RankSampler", "StepLog", "SupervisedHead", "TrainResult", "TrainSettings", "TuneResult", "TuneSettings",
           "attach", "budget_of", "check_engagement", "export_adapter", "frozen_digests", "full_blocks_for_budget",
           "load_plan", "lora_config", "make_plan", "merged_weights", "random_block_set", "require_gradients",
           "require_plan_fits", "save_merged", "train", "tune", "vllm_note", "with_weights"]

__getattr__, __dir__ = on_first_use(__name__, __file__, __all__)
