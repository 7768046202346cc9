"""Evaluation: scores of a model on tasks, through lm-evaluation-harness, item by item.

`evaluate` scores one model on one task, `evaluate_tasks` a model and its base on several; `compare` pairs
two results by item, `compare_logs` any two logs of lm-evaluation-harness or inspect; `TASKS` lists the tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from midblock.lazily import on_first_use

if TYPE_CHECKING:
    from midblock.evaluation.outcome import (
        Comparison,
        EvalResult,
        compare,
        file_name,
        lm_eval_results,
        perplexity_interval,
        read_result,
        write_lm_eval_files,
        write_result,
    )
    from midblock.evaluation.paired import LogComparison, compare_logs, read_log
    from midblock.evaluation.run import check_options, evaluate, model_limit
    from midblock.evaluation.sandbox import Outcome, ProgramTest, run_test
    from midblock.evaluation.serving import ServingCheck, check_serving
    from midblock.evaluation.suite import TasksResult, evaluate_tasks
    from midblock.evaluation.tasks import TASKS, TaskSpec, find_task, item_ids, task_data

__all__ = ["TASKS", "Comparison", "EvalResult", "LogComparison", "Outcome", "ProgramTest", "ServingCheck", "TaskSpec",
           "TasksResult", "check_options", "check_serving", "compare", "compare_logs", "evaluate", "evaluate_tasks",
           "file_name", "find_task", "item_ids", "lm_eval_results", "model_limit", "perplexity_interval", "read_log",
           "read_result", "run_test", "task_data", "write_lm_eval_files", "write_result"]

__getattr__, __dir__ = on_first_use(__name__, __file__, __all__)
