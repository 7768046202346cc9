"""The data sets known by name: the paper's seven benchmarks, Dolly and two built-in sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

__all__ = ["DATASETS", "DatasetInfo", "HubSplit", "task_words"]


@dataclass(frozen=True, slots=True)
class HubSplit:
    """A split on the Hugging Face hub; with ``partition``, our split is a content-hashed part of it."""

    name: str
    partition: bool = False


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """What is known of a named data set.

    Attributes:
        name: Name in specs.
        title: One line for people.
        use: What it serves for in the paper or here.
        licence: Of the data.
        folders: Names searched under ``MIDBLOCK_DATA``, first match first.
        hub: Hugging Face id; None for a built-in source.
        hub_config: Its configuration.
        hub_splits: Our split name -> the hub's.
        partition_of: Name of the only published local split where ``train`` and ``test`` are
            made by hashing each row's content, so that they share none.
        min_chars: Shorter texts are skipped (headings of WikiText, fragments of ToxiGen).
    """

    name: str
    title: str
    use: str
    licence: str
    folders: tuple[str, ...] = ()
    hub: str | None = None
    hub_config: str | None = None
    hub_splits: Mapping[str, HubSplit] = field(default_factory=dict)
    partition_of: str | None = None
    min_chars: int = 1

    @property
    def builtin(self) -> bool:
        """Whether the source is made here and needs neither files nor network."""
        return self.hub is None


def _same(*names: str) -> dict[str, HubSplit]:
    return {name: HubSplit(name) for name in names}


_INFOS = (
    DatasetInfo(
        "gsm8k", "GSM8K: grade-school word problems with worked answers (Cobbe et al. 2021)",
        "tuning, exact match, token and pooled level", "MIT", ("gsm8k",), "openai/gsm8k", "main",
        _same("train", "test")),
    DatasetInfo(
        "mmlu", "MMLU: four-way multiple choice over 57 subjects (Hendrycks et al. 2021)",
        "multiple choice, token and pooled level", "MIT", ("mmlu",), "cais/mmlu", "all",
        {**_same("test", "validation", "dev"), "train": HubSplit("auxiliary_train")}),
    DatasetInfo(
        "wikitext", "WikiText-2 raw: Wikipedia paragraphs (Merity et al. 2017)",
        "perplexity, token and pooled level", "CC BY-SA 3.0 and GFDL", ("wikitext", "wikitext2"),
        "Salesforce/wikitext", "wikitext-2-raw-v1", _same("train", "validation", "test"), min_chars=10),
    DatasetInfo(
        "ifeval", "IFEval: prompts with checkable instructions (Zhou et al. 2023)",
        "prompts for retention, token and pooled level", "Apache-2.0", ("ifeval",), "google/IFEval", None,
        {"test": HubSplit("train")}),
    DatasetInfo(
        "humaneval", "HumanEval: Python functions from docstrings (Chen et al. 2021)",
        "code, pooled level", "MIT", ("humaneval",), "openai/openai_humaneval", None, _same("test")),
    DatasetInfo(
        "mt_bench", "MT-Bench: two-turn open questions, first turn used (Zheng et al. 2023)",
        "prompts for retention, pooled level", "Apache-2.0", ("mt_bench",), "HuggingFaceH4/mt_bench_prompts",
        None, {"test": HubSplit("train")}),
    DatasetInfo(
        "toxigen", "ToxiGen, human-annotated part: is a statement hateful? (Hartvigsen et al. 2022)",
        "yes/no classification, pooled level", "MIT", ("toxigen",), "toxigen/toxigen-data", "annotated",
        _same("train", "test"), partition_of="annotated", min_chars=10),
    DatasetInfo(
        "dolly", "Dolly: instructions with human answers (Databricks 2023)",
        "tuning", "CC BY-SA 3.0", ("dolly",), "databricks/databricks-dolly-15k", None,
        {"train": HubSplit("train", partition=True), "test": HubSplit("train", partition=True)}),
    DatasetInfo(
        "arithmetic", "Generated word problems with worked answers; arithmetic@N has N steps (default 2)",
        "tuning and exact match without any download", "Apache-2.0 (generated here)"),
    DatasetInfo(
        "pydocs", "English prose from the reference text that CPython ships",
        "perplexity (retention) without any download", "PSF-2.0"),
)

_TASKS = ("gsm8k", "mmlu", "toxigen", "wikitext", "arithmetic", "pydocs")
"""Data sets that are a task of their own for `midblock evaluate`."""


def task_words(spec: str, *, answers: bool = True) -> tuple[str, ...]:
    """The words of ``midblock evaluate`` that score on a D spec.

    Args:
        spec: The data.
        answers: Whether its rows have completions; texts are scored by their perplexity.

    Example:
        >>> task_words("arithmetic@3"), task_words("mine.jsonl"), task_words("mine.jsonl", answers=False)[1]
        (('--task', 'arithmetic@3'), ('--task', 'answer_loss', '--data', 'mine.jsonl'), 'perplexity')
    """
    if spec.partition("@")[0].lower() in _TASKS:
        return ("--task", spec)
    return ("--task", "answer_loss" if answers else "perplexity", "--data", spec)


DATASETS: Mapping[str, DatasetInfo] = MappingProxyType({info.name: info for info in _INFOS})
"""Every data set known by name, in the order in which to show them."""
