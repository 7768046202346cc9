"""Several processes of one job: the same table as one process, the same errors, and an end when one dies."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from families import FAMILIES
from midblock import ranks
from several import accelerate, environment, run, run_all, torchrun
from sweep_helpers import write_rows, write_texts, write_tiny_model

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of tiny models (the second with other weights in blocks 2 and 3), texts and questions."""
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "base")
    write_tiny_model(folder / "sft")
    model, other = FAMILIES["llama"](seed=0, num_hidden_layers=5), FAMILIES["llama"](seed=1, num_hidden_layers=5)
    for b in (2, 3):
        model.model.layers[b].load_state_dict(other.model.layers[b].state_dict())
    model.save_pretrained(folder / "sft")
    write_texts(folder / "texts.jsonl", 23)
    write_rows(folder / "rows.jsonl", 0, 21)
    return folder


def lines(world: Path) -> dict[str, list[str]]:
    """Command -> words without --out."""
    base, sft, texts, rows = (str(world / n) for n in ("base", "sft", "texts.jsonl", "rows.jsonl"))
    small = ["--batch-size", "4", "--dtype", "float32", "--device", "cpu"]
    return {
        "profile": ["profile", base, sft, "--data", texts, "--samples", "20", "--token-samples", "9", *small],
        "lens": ["lens", base, sft, "--data", texts, "--samples", "20", *small],
        "lens-streamed": ["lens", base, sft, "--data", texts, "--samples", "20", "--stream", "always", *small],
        "swap": ["swap", base, sft, "--segments", "5", "--data", texts, "--samples", "20", *small],
        "swap-streamed": ["swap", base, sft, "--segments", "5", "--data", texts, "--samples", "20", "--stream",
                          "always", *small],
        "answer_loss": ["evaluate", base, "--task", "answer_loss", "--data", rows, *small],
        "exact_match": ["evaluate", base, "--task", "exact_match", "--data", rows, "--max-new-tokens", "5", *small],
        "multiple_choice": ["evaluate", base, "--task", "multiple_choice", "--data", str(world / "choices.jsonl"),
                            *small],
    }


def table(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "table.csv")


def samples(folder: Path) -> list[str]:
    return [line for p in sorted(folder.glob("samples_*.jsonl")) for line in p.read_text().splitlines()]


NAMES = ["profile", "lens", "lens-streamed", "swap", "swap-streamed", "answer_loss", "exact_match", "multiple_choice"]


@pytest.fixture(scope="module")
def told(world: Path) -> dict[int, list[list[dict[str, Any]]]]:
    """What 1, 2 and 3 processes give for every command: number of processes -> process -> command."""
    choices = [{"question": f"the number {n} is", "choices": [" one", " two", " another"], "answer": n % 3}
               for n in range(17)]
    (world / "choices.jsonl").write_text("".join(json.dumps(c) + "\n" for c in choices), encoding="utf-8")
    found = {}
    for processes in (1, 2, 3):
        out = world / "out" / str(processes)
        commands = [[*lines(world)[name], "--out", str(out / name)] for name in NAMES]
        found[processes] = run_all([sys.executable] if processes == 1 else torchrun(processes), commands,
                                   world / f"job{processes}", processes)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_table_of_one(world: Path, told: dict[int, list[list[dict[str, Any]]]], name: str,
                                                 processes: int) -> None:
    number = NAMES.index(name)
    alone, first, *others = (job[number] for job in (told[1][0], *told[processes]))
    assert alone["code"] == first["code"] == 0, (alone["stderr"], first["stderr"])
    one, shared = world / "out" / "1" / name, world / "out" / str(processes) / name
    pd.testing.assert_frame_equal(table(shared), table(one), rtol=1e-9, atol=1e-12)
    assert samples(shared) == samples(one)
    assert files(shared) == files(one)
    # one process speaks, and says what one process alone says
    assert spoken(first["stdout"]) == spoken(alone["stdout"])
    assert [(o["code"], o["stdout"], o["stderr"]) for o in others] == [(0, "", "")] * (processes - 1)


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def spoken(text: str) -> str:
    """Without folders and times."""
    return re.sub(r"/out/[123]/|[0-9.,]+ s\b", "", text)


@pytest.mark.slow
def test_accelerate_launches_it_too(world: Path, told: dict[int, Any], tmp_path: Path) -> None:
    done = run(accelerate(2, "-m", "midblock", *lines(world)["lens"], "--out", str(tmp_path / "two")))
    assert done.returncode == 0, done.stderr
    pd.testing.assert_frame_equal(table(tmp_path / "two"), table(world / "out" / "1" / "lens"), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_mistake_is_told_once(world: Path, tmp_path: Path) -> None:
    """The launcher ends the others while they still wait for the first to speak."""
    done = run(torchrun(2, "-m", "midblock", "weights", str(world / "base"), str(world / "sft"), "--out",
                        str(tmp_path / "out")))
    assert done.returncode != 0
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("Error:")]
    assert "midblock weights runs in one process, and this job has 2" in error
    assert not (tmp_path / "out").exists()
    # so it is for mistakes that are found later
    wrong = [["lens", str(world / "nothing"), "--data", str(world / "texts.jsonl")],
             ["lens", str(world / "base"), "--data", str(world / "texts.jsonl"), "--samples", "-3"],
             ["lens", str(world / "base"), "--data", str(world / "texts.jsonl"), "--out", str(world / "base")]]
    first, second = run_all(torchrun(2), wrong, tmp_path / "job", 2)
    for ours, theirs in zip(first, second, strict=True):
        assert ours["code"] == theirs["code"] == 2
        assert ours["stderr"].count("Error: ") == 1
        assert theirs["stderr"].replace("process 1 of 2: ", "") == ours["stderr"]


@pytest.mark.slow
def test_files_that_one_process_alone_sees_otherwise_are_refused(world: Path, tmp_path: Path) -> None:
    """Each process reads a copy of its own, and one of the copies was changed."""
    program = tmp_path / "apart.py"
    program.write_text(
        "import os, sys\n"
        "from midblock.cli.app import run\n"
        "sys.exit(run([w.replace('TEXTS', sys.argv[1] + os.environ['RANK'] + '.jsonl') for w in sys.argv[2:]]))\n",
        encoding="utf-8")
    for rank in (0, 1):
        text = (world / "texts.jsonl").read_text()
        (tmp_path / f"texts{rank}.jsonl").write_text(text.replace("there are 5 ", "there are 6 ") if rank else text)
    done = run(torchrun(2, str(program), str(tmp_path / "texts"), "lens", str(world / "base"), "--data", "TEXTS",
                        "--dtype", "float32", "--out", str(tmp_path / "out")))
    assert done.returncode != 0
    assert "process 1 of this job has another data than the first one" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_job(world: Path, tmp_path: Path, victim: int) -> None:
    """The launcher names it, within 30 seconds, and nobody is left."""
    program = tmp_path / "dying.py"
    program.write_text(
        "import os, signal, sys\n"
        "import midblock.capture.accumulators as a\n"
        "own, feed = int(os.environ['RANK']), a.PooledStates.feed\n"
        "def dying(self, h, batch, states):\n"
        f"    if own == {victim} and h == 2:\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    feed(self, h, batch, states)\n"
        "a.PooledStates.feed = dying\n"
        "from midblock.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n", encoding="utf-8")
    line = torchrun(2, str(program), *lines(world)["profile"], "--out", str(tmp_path / "out"))
    job = psutil.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    seen: set[psutil.Process] = set()
    begun = time.monotonic()
    while job.poll() is None:
        assert time.monotonic() - begun < 120
        seen |= set(job.children(recursive=True))
        time.sleep(0.2)
    told = job.stderr.read()
    assert job.returncode != 0
    assert f"rank      : {victim} " in told
    assert "SIGKILL" in told or "exitcode  : -9" in told
    assert not [p for p in seen if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def test_one_process_shares_with_nobody() -> None:
    assert (ranks.rank(), ranks.size(), ranks.follows()) == (0, 1, False)
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert ranks.first(lambda: 5) == 5
    assert ranks.everybody("a") == ranks.to_first("a") == ["a"]


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_only_a_launchers_whole_environment_is_a_job(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost",
                        "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert ranks.asked() == (1, 2)
    monkeypatch.delenv(missing)
    assert ranks.asked() is None
    monkeypatch.setenv(missing, "1")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert ranks.asked() is None
