"""A sweep's configuration: one YAML file is the experiment.

Every key is checked before anything is loaded, unknown keys are refused, and all faults are
reported at once with the path of each key.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from midblock.errors import MidblockError, SettingsError
from midblock.evaluation import check_options, find_task
from midblock.reading import parse_yaml, printable, read_yaml, user_path
from midblock.settings.base import as_keys, faults_of
from midblock.settings.sweep import SweepConfig, TaskConfig
from midblock.tuning.cache import PrefixCache

__all__ = ["dump_config", "load_config", "parse_config"]

_LONGEST_LINE = 500


def _faults_across(config: SweepConfig) -> list[str]:
    """Faults that only show between keys."""
    faults = []
    for key, values in (("seeds", config.seeds),
                        ("training.learning_rates", config.training.learning_rates),
                        ("training.full_learning_rates", config.training.full_learning_rates)):
        if len(set(values)) < len(values):
            faults.append(f"{key}: {values} names one value twice")
    labels = [t.label for t in (*config.evaluation, *config.retention)]
    for label in sorted({x for x in labels if labels.count(x) > 1}):
        faults.append(f"evaluation, retention: two tasks are called {label!r}; give one of them a name:")
    for i, task in enumerate(config.retention):
        if find_task(task.task).kind not in ("perplexity", "answer_loss"):
            faults.append(f"retention.{i}.task: {task.task} is no perplexity or loss task; retention is measured "
                          "as a change of the log perplexity (pydocs, wikitext, ifeval_prompts, mt_bench)")
    if max(len(config.training.learning_rates), len(config.training.full_learning_rates)) > 1 \
            and not config.train.validation:
        faults.append("train.validation: a grid of learning rates needs validation rows to choose by; choosing "
                      "by the evaluation items would favour the arms with luck")
    try:
        PrefixCache.from_spec(config.cache, limit_bytes=config.cache_limit)
    except MidblockError as error:
        faults.append(f"cache: {error}")
    for i, path in enumerate(config.arms.plans):
        if not Path(path).expanduser().is_file():
            faults.append(f"arms.plans.{i}: there is no file {path}")
    names = [a.name for a in config.arms.explicit]
    for name in sorted({n for n in names if names.count(n) > 1}):
        faults.append(f"arms.explicit: two arms are called {name!r}")
    if "base" in names:
        faults.append("arms.explicit: the name 'base' belongs to the untuned model")
    return faults


def parse_config(values: Mapping[str, Any], *, where: str = "the sweep's configuration") -> SweepConfig:
    """Validate a configuration.

    Args:
        values: As read from YAML.
        where: Name of the source in messages.

    Raises:
        SettingsError: with every fault, one a line, each with the path of its key.
    """
    values = dict(values)
    faults = _task_faults(values)
    try:
        config = SweepConfig.model_validate(values)
    except ValidationError as error:
        raise _refusal(where, [*faults_of(error, SweepConfig, unknown="key"), *faults]) from None
    if faults := faults or _faults_across(config):
        raise _refusal(where, faults)
    return config


def _refusal(where: str, faults: list[str]) -> SettingsError:
    count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
    return SettingsError(f"{where} has {count}:\n" + "\n".join(f"  {printable(f)[:_LONGEST_LINE]}" for f in faults))


def _task_faults(values: Mapping[str, Any]) -> list[str]:
    """Tasks that there are not, and options that they do not have; values of a wrong type are passed over."""
    faults = []
    for key in ("evaluation", "retention"):
        tasks = values.get(key)
        for i, task in enumerate(tasks if isinstance(tasks, list) else []):
            try:
                wanted = TaskConfig.model_validate(task)
                if check_options(wanted.task, wanted.scoring).data is None and wanted.data is None:
                    raise SettingsError(f"task {wanted.task} has no data of its own; name some with data:")
            except ValidationError:
                continue
            except MidblockError as error:
                faults.append(f"{key}.{i}: {error}")
    return faults


@as_keys()
def load_config(path: Path | str, overrides: Sequence[str] = ()) -> SweepConfig:
    """A configuration file with ``KEY=VALUE`` overrides (``training.epochs=1``, ``evaluation.0.samples=20``).

    Args:
        path: The YAML file.
        overrides: Keys to set.

    Raises:
        SettingsError: no such file, not YAML, or any fault in it (all are listed).
    """
    path = user_path(path, error=SettingsError)
    values = read_yaml(path, error=SettingsError)
    if not isinstance(values, dict):
        raise SettingsError(f"configuration {path} holds no keys; start from a file in recipes/.")
    faults = [fault for text in overrides if (fault := _override(values, text))]
    if faults:
        raise _refusal(f"--set for {path}", faults)
    return parse_config(values, where=str(path))


def _override(values: dict[str, Any], text: str) -> str | None:
    key, equals, raw = text.partition("=")
    if not equals or not key.strip():
        return f"{text!r} is not KEY=VALUE, such as training.epochs=1"
    try:
        value = parse_yaml(raw, where=key, error=SettingsError)
    except SettingsError as error:
        return str(error)
    place: Any = values
    *parents, last = key.strip().split(".")
    for i, part in enumerate([*parents, last]):
        at_end = i == len(parents)
        if isinstance(place, list):
            if not re.fullmatch(r"[0-9]{1,6}", part) or int(part) >= len(place):
                return f"{key}: {'.'.join(parents[:i])} has entries 0 to {len(place) - 1}, not {part!r}"
            if at_end:
                place[int(part)] = value
            else:
                place = place[int(part)]
        elif isinstance(place, dict):
            if at_end:
                place[part] = value
            else:
                if place.get(part) is None:
                    place[part] = {}
                place = place[part]
        else:
            return f"{key}: {'.'.join(parents[:i])} holds {place!r}, which has no keys"
    return None


def dump_config(config: SweepConfig) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
        style = "'" if re.fullmatch(r"[-+0-9.eE_]+", value) else None
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)

    Dumper.add_representer(str, text)
    values = config.model_dump(mode="json")
    # what an arm does not say itself is the sweep's
    values["arms"]["explicit"] = [arm.model_dump(mode="json", exclude_unset=True) for arm in config.arms.explicit]
    return str(yaml.dump(values, Dumper=Dumper, sort_keys=False, width=100))
