"""One training by several processes: the losses and weights of one process, whole or with sharded blocks."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from several import accelerate, run, run_all, torchrun
from sweep_helpers import write_rows, write_tiny_model

pytestmark = [pytest.mark.e2e, pytest.mark.slow]
CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "accelerate"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_tiny_model(folder / "model")
    write_rows(folder / "train.jsonl", 0, 22)  # the last batch of an epoch has two rows: a part may be empty
    write_rows(folder / "held.jsonl", 50, 9)
    return folder


def words(world: Path, out: Path, *more: str) -> list[str]:
    size = () if "full" in more else ("--rank", "4")
    return ["-m", "midblock", "tune", str(world / "model"), "--data", str(world / "train.jsonl"), "--eval-data",
            str(world / "held.jsonl"), "--epochs", "3", "--batch-size", "4", "--mask", "00110", *size,
            "--learning-rate", "0.01", "--device", "cpu", "--out", str(out), *more]


def found(out: Path) -> dict[str, Any]:
    run_json = json.loads((out / "run.json").read_text())
    assert run_json["status"] == "finished"
    steps = [json.loads(line) for line in (out / "checkpoints" / "steps.jsonl").read_text().splitlines()]
    weights = next(p for p in (out / "adapter" / "adapter_model.safetensors", out / "model" / "model.safetensors")
                   if p.is_file())
    return {"losses": [s["loss"] for s in steps], "tokens": [s["tokens"] for s in steps],
            "results": run_json["results"], "state": load_file(weights)}


def same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float) -> None:
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=tolerance)
    assert ours["tokens"] == theirs["tokens"]
    assert ours["state"].keys() == theirs["state"].keys()
    for name, value in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], value, rtol=tolerance, atol=tolerance)
    for side, estimate in theirs["results"]["held_out"].items():
        assert ours["results"]["held_out"][side]["value"] == pytest.approx(estimate["value"], rel=tolerance,
                                                                           abs=tolerance)


VARIANTS = {"lora": (), "accumulate": ("--accumulate", "2"), "dora": ("--method", "dora"),
            "checkpointing": ("--gradient-checkpointing",), "full": ("--method", "full")}


@pytest.fixture(scope="module")
def trained(world: Path) -> Path:
    """Every variant by one process, by two and three, and by two with sharded blocks."""
    jobs = {"one": ([sys.executable], 1), "two": (torchrun(2), 2), "three": (torchrun(3), 3),
            "sharded": (accelerate(2, config=CONFIGS / "fsdp2.yaml"), 2)}
    for name, (launcher, processes) in jobs.items():
        commands = [words(world, world / name / variant, "--dtype", "float32", *more)[2:]
                    for variant, more in VARIANTS.items()]
        for told in run_all(launcher, commands, world / f"job-{name}", processes):
            assert [t["code"] for t in told] == [0] * len(VARIANTS), told
    return world


@pytest.mark.parametrize("job", ["two", "three", "sharded"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_several_processes_train_as_one(trained: Path, job: str, variant: str) -> None:
    alone, shared = found(trained / "one" / variant), found(trained / job / variant)
    same(shared, alone, 2e-5)
    held = "a part" if job == "sharded" else "the whole"
    assert any(f"processes, each with {held} of the frozen blocks" in n for n in shared["results"]["training"]["notes"])
    # each row was computed once, by the process whose it is, in all three epochs
    prefix, own = (f["results"]["training"]["prefix"] for f in (shared, alone))
    assert prefix["start"] == own["start"] == 2
    assert prefix["rows_computed"] < own["rows_computed"]
    assert prefix["rows_from_cache"] > 0
    assert prefix["rows_bypassed"] == 0


def test_sharded_blocks_of_bfloat16_with_float32_adapters(world: Path, tmp_path: Path) -> None:
    """The whole adapter is there whatever accelerate calls the state dict, in float32, and resumes."""
    own = words(world, tmp_path / "one", "--dtype", "bfloat16")[2:]
    (told,) = run_all([sys.executable], [own], tmp_path / "job", 1)
    assert told[0]["code"] == 0, told
    alone = found(tmp_path / "one")
    for kind in ("FULL_STATE_DICT", "SHARDED_STATE_DICT"):
        config = tmp_path / f"{kind}.yaml"
        config.write_text((CONFIGS / "fsdp2.yaml").read_text().replace("FULL_STATE_DICT", kind), encoding="utf-8")
        out = tmp_path / kind
        done = run(accelerate(2, *words(world, out, "--dtype", "bfloat16"), config=config))
        assert done.returncode == 0, done.stderr[-3000:]
        shared = found(out)
        assert {t.dtype for t in shared["state"].values()} == {torch.float32}
        assert {n: t.shape for n, t in shared["state"].items()} == {n: t.shape for n, t in alone["state"].items()}
        assert shared["losses"] == pytest.approx(alone["losses"], rel=0.02)


def test_an_interrupted_job_resumes(world: Path, tmp_path: Path) -> None:
    more = ("--dtype", "float32", "--save-steps", "3")
    one = run(torchrun(2, *words(world, tmp_path / "one", *more)))
    assert one.returncode == 0, one.stderr[-3000:]
    program = tmp_path / "stopping.py"
    program.write_text(
        "import os, signal, sys\n"
        "from midblock.tuning.sft import Watch\n"
        "end = Watch.on_step_end\n"
        "def stop(self, args, state, control, **kwargs):\n"
        "    if state.global_step == 8:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "    end(self, args, state, control, **kwargs)\n"
        "Watch.on_step_end = stop\n"
        "from midblock.cli.app import run\n"
        "sys.exit(run(sys.argv[1:]))\n", encoding="utf-8")
    own = words(world, tmp_path / "two", *more)
    stopped = run(torchrun(2, str(program), *own[2:]))
    assert stopped.returncode != 0
    assert not (tmp_path / "two" / "adapter").exists()
    again = run(torchrun(2, *own, "--resume"))
    assert again.returncode == 0, again.stderr[-3000:]
    same(found(tmp_path / "two"), found(tmp_path / "one"), 1e-6)
    resumed = json.loads((tmp_path / "two" / "run.json").read_text())["results"]["training"]["resumed_from"]
    assert resumed == 6


def test_what_several_processes_cannot_share_is_refused(world: Path, tmp_path: Path) -> None:
    few = words(world, tmp_path / "few", "--batch-size", "1")
    done = run(torchrun(2, *few))
    assert "a batch of 1 rows cannot be shared by 2 processes" in done.stderr
    old = tmp_path / "old.yaml"
    old.write_text((CONFIGS / "fsdp2.yaml").read_text().replace("fsdp_version: 2", "fsdp_version: 1"), encoding="utf-8")
    done = run(accelerate(2, *words(world, tmp_path / "old"), config=old))
    assert "set fsdp_version: 2" in done.stderr


SHARDED = """
import json, sys
import torch
from torch import distributed
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
from families import FAMILIES
import midblock
from midblock import ranks
from midblock.capture.interventions import hidden_of_output
from midblock.models import find_anatomy
from midblock.tuning import FrozenPrefix
from midblock.tuning.sharding import sharded

model = FAMILIES["llama"](seed=0, num_hidden_layers=5).to(torch.bfloat16).train()
before = {n: p.clone() for n, p in model.named_parameters()}
objects = {n: id(p) for n, p in model.named_parameters()}
kinds = [type(m) for m in model.modules()]
anatomy = find_anatomy(model)
model.requires_grad_(False)
for b in (3, 4):
    for p in anatomy.blocks[b].self_attn.q_proj.parameters():
        p.data = p.data.clone()
        p.requires_grad_(True)
trained = [p for p in model.parameters() if p.requires_grad]
gathered = []
unshard = groups.FSDPParamGroup.unshard
def counted(self, *args, **kwargs):
    gathered.append(self._module_fqn)
    return unshard(self, *args, **kwargs)
groups.FSDPParamGroup.unshard = counted
told = []
with ranks.joined():
    rank = ranks.rank()
    rows = torch.arange(3 + 10 * rank, 13 + 10 * rank).reshape(2, 5)
    plain = model(rows).logits
    prefix = FrozenPrefix(model, cache="memory")
    prefix.prepare()
    prefix.together(lambda here: any(ranks.everybody(here)))
    sizes = {n: p.numel() for n, p in model.named_parameters()}
    with sharded(anatomy, trained), prefix:
        parts = {n: p.to_local().numel() if hasattr(p, "to_local") else p.numel() for n, p in model.named_parameters()}
        for step in range(3):
            gathered.clear()
            for p in trained:
                p.grad = None
            # in the third step one of the processes has a row that is new to it
            ids = rows.flip(0) if step == 1 else rows + (50 if step == 2 and rank == 1 else 0)
            logits = model(ids, labels=ids).logits
            same = step == 2 and rank == 1 or torch.equal(logits, plain.flip(0) if step == 1 else plain)
            model(ids, labels=ids).loss.backward()
            told.append({"gathered": sorted({g for g in gathered if g}), "equal": bool(same),
                         "gradients": all(p.grad is not None and bool(p.grad.any()) for p in trained)})
    after = {n: p for n, p in model.named_parameters()}
    whole = (all(torch.equal(after[n], before[n]) for n in before) and {n: id(p) for n, p in after.items()} == objects
             and [type(m) for m in model.modules()] == kinds and not any(
                 m._forward_pre_hooks or m._forward_hooks for b in anatomy.blocks for m in b.modules()))
    again = torch.equal(model(rows).logits, plain)
    with sharded(anatomy, trained):  # a second time
        twice = torch.equal(model(rows).logits, plain)
    block = sum(parts[n] for n in sizes if ".layers.0." in n) / sum(sizes[n] for n in sizes if ".layers.0." in n)
    with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
        json.dump({"steps": told, "whole": whole, "again": again, "twice": twice, "share": block,
                   "computed": prefix.rows_computed, "cached": prefix.rows_cached}, file)
"""


def test_blocks_that_are_passed_over_are_not_gathered(tmp_path: Path) -> None:
    """Torch's own FSDP2 is watched: which blocks it gathers in each step, and that the model is what it was."""
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED, encoding="utf-8")
    done = run(torchrun(2, str(script), str(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        told = json.loads((tmp_path / f"{rank}.json").read_text())
        assert told["whole"]
        assert told["again"]
        assert told["twice"]
        assert told["share"] == pytest.approx(0.5, abs=0.05)
        blocks = [[int(g.rpartition(".")[2]) for g in step["gathered"]] for step in told["steps"]]
        assert blocks[0] == [0, 1, 2, 3, 4]
        assert blocks[1] == [3, 4]  # everything before block 3 comes from the cache
        assert blocks[2] == [0, 1, 2, 3, 4]  # the other process needs them
        assert all(step["equal"] and step["gradients"] for step in told["steps"])
