"""Every command, option, function, metric and recipe that the pages of docs name exists."""

from __future__ import annotations

import importlib
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from midblock.cli.app import COMMANDS, app
from midblock.quantities import quantities

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md",
         *(p for p in sorted((REPOSITORY / "docs").rglob("*.md")) if p.name not in ("cli.md", "adding-a-metric.md"))]


@cache
def options(command: str) -> set[str]:
    return {o for p in typer.main.get_command(app).commands[command].params for o in p.opts}  # type: ignore[attr-defined]


def spans(page: Path) -> list[str]:
    """What stands between backticks, and the commands of code blocks."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```[^\n]*\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    lines = [line.split("#")[0].strip() for b in blocks for line in b.replace("\\\n", " ").splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [*inline, *(line.removeprefix("$ ") for line in lines)]


def fault(span: str) -> str | None:
    """What is wrong with a command or a name, if anything."""
    words = span.split()
    if words[:1] == ["midblock"] and len(words) > 1 and re.fullmatch(r"[a-z][a-z-]*", words[1]):
        if words[1] not in COMMANDS:
            return f"no command {words[1]}"
        wrong = [w for w in re.findall(r"(?<!\S)--[a-z0-9-]+", span) if w not in options(words[1]) | {"--help"}]
        return f"no option {', '.join(wrong)}" if wrong else None
    if re.fullmatch(r"midblock(\.\w+)+(\(.*\))?", span):
        return None if resolves(span.partition("(")[0]) else "no such name"
    return None


def resolves(dotted: str) -> bool:
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(REPOSITORY).as_posix())
def test_commands_options_and_names_on_a_page_exist(page: Path) -> None:
    wrong = {span: why for span in spans(page) if (why := fault(span))}
    assert wrong == {}


@pytest.mark.parametrize("span", ["midblock unheard-of", "midblock profil BASE", "midblock profile --papre",
                                  "midblock.metrics.ckaa", "midblock.nowhere.cka"])
def test_a_name_that_is_gone_is_noticed(span: str) -> None:
    assert fault(span) is not None


def test_the_index_has_every_equation_figure_table_and_appendix() -> None:
    text = (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")
    first = {heading: set(re.findall(r"^\| ([\w.]+) \|", part, flags=re.MULTILINE))
             for heading, part in re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", text, flags=re.DOTALL | re.MULTILINE)}
    assert {str(n) for n in range(1, 11)} <= first["Equations"]
    assert {str(n) for n in range(1, 8)} <= first["Figures"]
    assert {str(n) for n in range(1, 5)} <= first["Tables"]
    assert {"A", "B", "C"} <= first["Appendices and setting"]


def test_the_metrics_and_recipes_of_the_index_exist() -> None:
    text = (REPOSITORY / "docs" / "paper.md").read_text(encoding="utf-8")
    known = {q.name for q in quantities()}
    listed = re.search(r"not numbered in the paper: (.+?)\.\s", text, flags=re.DOTALL)
    assert listed is not None
    named = set(re.findall(r"`(\w+)`", listed.group(1))) | {
        "weight_change", "prompt_entropy", "dataset_entropy", "effective_rank", "rank_deficiency", "sparsity",
        "curvature", "cka", "cka_debiased", "cosine", "mean_shift", "ila_score", "taylor", "update_norm"}
    assert named <= known
    assert all(f"`{name}`" in text for name in named)
    for recipe in re.findall(r"`(recipes/[^`]+)`", text):
        assert (REPOSITORY / recipe).exists(), recipe
