"""Damaged inputs end in one clear line or in a result. All that builds the small world is slow; the judge is not."""

# ruff: noqa: F811  (the fixture is imported by name)
from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest
from campaign_fixtures import world  # noqa: F401
from campaign_mutations import KINDS, damage
from campaign_results import run_in
from campaign_world import COMMANDS, FAST, Case, build_models, case_of

from campaign import campaign, is_good, judge, run_case, snapshot
from midblock.cli import app

pytestmark = pytest.mark.filterwarnings("ignore")
CASES = 8


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small") / "w"
    folder.mkdir()
    build_models(folder)
    (folder / "d.jsonl").write_text("".join(
        json.dumps({"prompt": f"what is {i}? ", "completion": f"it is {i}."}) + "\n" for i in range(6)))
    return folder


@pytest.mark.e2e
@pytest.mark.parametrize(("words", "target"), [
    ("inspect m", "m/config.json"), ("inspect m", "m/model.safetensors"),
    ("weights m m-sft --no-spectra --quiet --out out", "m-sft/model.safetensors"),
    (f"lens m --data d.jsonl {FAST}", "d.jsonl"), (f"lens m --data d.jsonl {FAST}", "m/config.json")])
def test_a_few_damaged_inputs(small: Path, tmp_path: Path, words: str, target: str) -> None:
    """What of the campaign is fast enough for every run of the tests."""
    for seed in range(CASES):
        place = tmp_path / str(seed)
        shutil.copytree(small, place)
        what = damage(place / target, random.Random(f"{words} {target} {seed}"))
        before = snapshot(place)
        code, out, err = run_in(place, words.split())
        verdict = judge(Case(words.split(), target), code, out, err, before, place, 0.0)
        assert verdict in ("ok", "refused"), (what, verdict, err)


@pytest.mark.slow
@pytest.mark.e2e
def test_some_damaged_inputs(world: Path) -> None:
    bad = [result for number in range(24) if not is_good(result := run_case(11, number, world))]
    assert bad == []


@pytest.mark.slow
@pytest.mark.e2e
def test_a_thousand_damaged_inputs(world: Path) -> None:
    results = list(campaign(int(os.environ.get("CAMPAIGN_SEED", "7")), 1000, world))
    assert len(results) == 1000
    counts = Counter(r["verdict"] for r in results)
    assert [r for r in results if not is_good(r)] == [], counts
    assert counts["refused"] > 300  # the damage is real
    assert counts["ok"] > 100  # and not everything is refused


@pytest.mark.slow
def test_every_case_is_made_again_from_its_number(world: Path) -> None:
    for number in range(3 * len(COMMANDS)):
        assert case_of(5, number, world) == case_of(5, number, world)
    commands = {command.split()[0] for command, _ in COMMANDS}
    assert {case_of(5, n, world).words[0] for n in range(len(COMMANDS))} == commands
    assert commands == {*app.COMMANDS} - {"demo"}  # which reads nothing but its options


@pytest.mark.slow
@pytest.mark.parametrize("suffix", KINDS)
def test_damage_changes_the_file(world: Path, tmp_path: Path, suffix: str) -> None:
    source = next(p for p in sorted(world.rglob(f"*{suffix}")) if p.stat().st_size > 100)
    changed = 0
    for seed in range(40):
        path = tmp_path / f"{seed}{suffix}"
        path.write_bytes(source.read_bytes())
        damage(path, random.Random(seed))
        changed += not path.is_file() or path.is_symlink() or path.read_bytes() != source.read_bytes()
    assert changed >= 36


@pytest.mark.parametrize(("code", "err", "verdict"), [
    (0, "", "ok"), (2, "Error: x\n", "refused"), (2, "", "0 error lines"), (2, "Error: x\nError: y\n", "2 error lines"),
    (0, "Error: x\n", "1 error lines"), (1, "", "exit 1"), (None, "", "traceback"),
    (2, "Error: \x1b[31m\n", "control characters"),
    (2, "Traceback (most recent call last)\nError: x\n", "traceback")])
def test_the_judge(tmp_path: Path, code: int | None, err: str, verdict: str) -> None:
    assert judge(Case(["x"], None), code, "", err, snapshot(tmp_path), tmp_path, 1.0) == verdict


def test_the_judge_sees_what_was_left_or_touched(tmp_path: Path) -> None:
    case = Case(["x"], None)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    before = snapshot(tmp_path)
    assert judge(case, 0, "", "", before, tmp_path, 61.0) == "slow"
    (tmp_path / "m" / "config.json").write_text("[]")
    assert judge(case, 0, "", "", before, tmp_path, 1.0) == "touched m/config.json"
    (tmp_path / ".midblock-tmp-x").write_text("")
    assert judge(case, 0, "", "", before, tmp_path, 1.0) == "half-written .midblock-tmp-x"
    (tmp_path / ".midblock-tmp-x").unlink()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text(json.dumps({"status": "running"}))
    assert judge(case, 2, "", "Error: x", snapshot(tmp_path), tmp_path, 1.0) == "status running"
