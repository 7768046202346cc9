"""A trainer of one's own under `accelerate launch`: two processes on the CPU, each with its own prefix cache."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from midblock.errors import SettingsError
from midblock.tuning import RankSampler

SCRIPT = """
import json, sys
import torch, transformers
import midblock
from accelerate import PartialState
from families import FAMILIES
from midblock.tuning.batching import collator

out, cached = sys.argv[1], sys.argv[2]
model = FAMILIES["llama"](seed=0)
torch.manual_seed(0)
rows = [{"input_ids": [3 + (5 * i + j) % 90 for j in range(6 + i % 3)], "labels": [3 + (5 * i + j) % 90 for j in range(
    6 + i % 3)]} for i in range(10)]
config = midblock.lora_config(model, mask="0011", rank=2)
import peft
tuned = peft.get_peft_model(model, config)

class Trainer(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return midblock.RankSampler(len(self.train_dataset), self.args.per_device_train_batch_size,
                                    self.args.world_size)

trainer = Trainer(tuned, train_dataset=rows, data_collator=collator(0), args=transformers.TrainingArguments(
    output_dir=out, num_train_epochs=3, per_device_train_batch_size=2, learning_rate=1e-2,
    use_cpu=True, ddp_backend="gloo",
    report_to="none",
    save_strategy="no", disable_tqdm=True, logging_steps=1, lr_scheduler_type="constant", remove_unused_columns=False,
    ddp_find_unused_parameters=False, dataloader_pin_memory=False))
if cached == "yes":
    with midblock.FrozenPrefix(tuned, cache="memory") as prefix:
        trainer.train()
    told = prefix.describe()
else:
    trainer.train()
    told = {}
rank = PartialState().process_index
state = {n: p.double().sum().item() for n, p in tuned.named_parameters() if p.requires_grad}
with open(f"{out}/{cached}-{rank}.json", "w") as file:
    json.dump({"processes": PartialState().num_processes, "prefix": {k: told.get(k) for k in (
        "start", "rows_from_cache", "rows_computed")}, "state": state,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e]}, file)
"""


@pytest.mark.slow
@pytest.mark.e2e
def test_rows_stay_on_their_process_and_come_from_its_cache(tmp_path: Path) -> None:
    # --multi_gpu is accelerate's name for torch's launcher; the script itself stays on the CPU (gloo)
    script = tmp_path / "train.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(
        [str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH", "")])}
    for cached in ("yes", "no"):
        done = subprocess.run(
            [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
             "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
             str(script), str(tmp_path), cached], env=environment, capture_output=True, text=True, timeout=600,
            check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    found = {(cached, rank): json.loads((tmp_path / f"{cached}-{rank}.json").read_text())
             for cached in ("yes", "no") for rank in (0, 1)}
    assert {f["processes"] for f in found.values()} == {2}
    for rank in (0, 1):
        # 5 rows of its own in 3 batches of 2: one of them is seen twice in an epoch; all later ones are read
        prefix = found["yes", rank]["prefix"]
        assert prefix["start"] == 2
        assert prefix["rows_computed"] == 5
        assert prefix["rows_from_cache"] == 3 * 6 - 5
        for name, total in found["no", rank]["state"].items():
            assert found["yes", rank]["state"][name] == pytest.approx(total, abs=1e-4)
    assert found["yes", 0]["state"] == found["yes", 1]["state"]  # gradients were averaged over both


@pytest.mark.parametrize(("rows", "batch", "processes"), [(10, 2, 2), (13, 3, 4), (4, 8, 3), (7, 1, 1)])
def test_every_row_is_on_one_process_in_every_epoch(rows: int, batch: int, processes: int) -> None:
    sampler = RankSampler(rows, batch, processes, seed=3)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert len(order) == len(sampler)
        assert set(order) == set(range(rows))
        assert max(Counter(order).values()) <= -(-len(order) // (processes * (rows // processes)))
        batches = [order[i:i + batch] for i in range(0, len(order), batch)]
        for number, own in enumerate(batches):  # as accelerate deals them
            assert {i % processes for i in own} == {number % processes}


def test_epochs_have_orders_of_their_own_and_seeds_too() -> None:
    def order(epoch: int, seed: int = 0) -> list[int]:
        sampler = RankSampler(20, 2, 2, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0) != order(1) != order(0, seed=1)


@pytest.mark.parametrize("numbers", [(1, 1, 2), (4, 0, 2), (4, 2, 0)])
def test_what_cannot_be_dealt_is_refused(numbers: tuple[int, int, int]) -> None:
    with pytest.raises(SettingsError, match="cannot be dealt"):
        RankSampler(*numbers)
