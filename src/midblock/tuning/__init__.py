"""Mid-Block tuning: plans, the frozen prefix, training, checks and exports (room 5).

Usual way: `tune`, or step by step `make_plan` -> `attach` -> `train` -> `check_engagement` ->
`export_adapter`. For a trainer of one's own: `lora_config` and `FrozenPrefix`.
"""

from __future__ import annotations

from midblock.tuning.adapter import Attachment, attach
from midblock.tuning.cache import PrefixCache, parse_bytes
from midblock.tuning.check import EngagementReport, check_engagement, frozen_digests
from midblock.tuning.export import export_adapter, merged_weights, save_merged, vllm_note, with_weights
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
from midblock.tuning.run import TuneResult, tune
from midblock.tuning.trainer import StepLog, TrainResult, TrainSettings, train

__all__ = ["Attachment", "EngagementReport", "FrozenPrefix", "ModulePlan", "Plan", "PrefixCache", "StepLog",
           "TrainResult", "TrainSettings", "TuneResult", "attach", "budget_of", "check_engagement",
           "export_adapter", "frozen_digests", "full_blocks_for_budget", "load_plan", "lora_config", "make_plan",
           "merged_weights", "parse_bytes", "random_block_set", "require_plan_fits", "save_merged", "train",
           "tune", "vllm_note", "with_weights"]
