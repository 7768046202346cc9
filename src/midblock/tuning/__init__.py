"""Mid-Block tuning: plans, the frozen prefix, training, checks and exports (room 5)."""

from __future__ import annotations

from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.cache import PrefixCache
from midblock.tuning.plan import (
    ModulePlan,
    Plan,
    budget_of,
    full_blocks_for_budget,
    load_plan,
    lora_config,
    make_plan,
    random_block_set,
    require_plan_fits,
)
from midblock.tuning.prefix import FrozenPrefix
from midblock.tuning.trainer import StepLog, TrainResult, TrainSettings, train

__all__ = ["Attachment", "FrozenPrefix", "ModulePlan", "Plan", "PrefixCache", "StepLog", "TrainResult", "TrainSettings", "attach", "budget_of", "full_blocks_for_budget",
           "load_plan", "lora_config", "make_plan", "random_block_set", "require_plan_fits", "train"]
