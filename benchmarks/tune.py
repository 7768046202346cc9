"""Tokens per second of tuning: TRL's SFTTrainer with PEFT against midblock, in one run.

Same model, rows, batch size, dtype, number of steps, no gradient checkpointing on either
side. Tokens are real ones: padding is not counted, as it is work without use. The table shows

* TRL + PEFT, LoRA of rank 16 on all blocks, and the same with ``layers_to_transform`` of 01100;
* midblock at the same number of trainable parameters for 11111, 01100, 00100 and 00110: the first
  epoch (which fills the prefix cache) and a cached epoch;
* midblock 01100 without the cache, whose losses must be those of the cached run.

Each contender runs in a process of its own, after a warm-up step, one after the other.

    python benchmarks/tune.py                   # about 5 minutes on 2 cores
    python benchmarks/tune.py --profile         # where the time goes, for TRL and for 01100
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import _common as common  # first: it mends the import path and sets the environment

os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")

import pandas as pd
from datasets import Dataset
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from midblock.cli.console import print_table
from midblock.data import TokenRow, load_data, tokenize
from midblock.errors import DataError
from midblock.models import LoadedModel, load_model
from midblock.segments import segment_blocks
from midblock.tuning import PrefixCache, TrainSettings, attach, make_plan, train
from midblock.tuning.batching import labels_of

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
TRL_ALL, TRL_SAME = "TRL + PEFT, all blocks", "TRL + PEFT, blocks of 01100"
UNCACHED = "midblock 01100, no cache"


class Steps(TrainerCallback):
    """Seconds of every step, and what was in it."""

    @staticmethod
    def clock() -> float:
        common.synchronize()
        return time.perf_counter()

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.tokens: list[int] = []
        self.padded: list[int] = []
        self.losses: list[float] = []
        self._began = 0.0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self._began = self.clock()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds.append(self.clock() - self._began)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


def run_trl(model: LoadedModel, rows: list[TokenRow], batch: int, steps: int, blocks: list[int] | None,
            profiler: Any = None) -> dict[str, Any]:
    """TRL's SFTTrainer as its users call it, on rows that are already tokenised."""
    watch = Steps()
    data = Dataset.from_dict({"input_ids": [list(r.ids) for r in rows], "labels": [labels_of(r) for r in rows]})
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            load_model(model.folder, dtype=model.dtype, check_finite=False).model, train_dataset=data,
            processing_class=model.tokenizer, callbacks=[watch],
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=TARGETS, layers_to_transform=blocks,
                                   task_type="CAUSAL_LM"),
            args=SFTConfig(output_dir=folder, per_device_train_batch_size=batch, max_steps=steps, logging_steps=1,
                           save_strategy="no", report_to="none", bf16=False, use_cpu=model.device.type == "cpu",
                           gradient_checkpointing=False, learning_rate=5e-4, disable_tqdm=True, max_length=None,
                           dataloader_pin_memory=False))
        collate = trainer.data_collator

        def counted(examples: list[dict[str, Any]]) -> dict[str, Any]:
            made = collate(examples)
            watch.tokens.append(int(made["attention_mask"].sum()))
            watch.padded.append(made["attention_mask"].numel())
            return made

        trainer.data_collator = counted
        # TRL prints a line a step
        with profiler or contextlib.nullcontext(), contextlib.redirect_stdout(sys.stderr):
            trainer.train()
    tokens, padded = watch.tokens[:steps], watch.padded[:steps]
    rate = sum(tokens) / sum(watch.seconds)
    return {"first": rate, "last": rate, "padding": 1 - sum(tokens) / sum(padded),
            "losses": watch.losses[:steps], "parameters": sum(
                p.numel() for p in trainer.model.parameters() if p.requires_grad)}


def run_midblock(model: LoadedModel, rows: list[TokenRow], batch: int, mask: str, cache: str, epochs: int,
                 profiler: Any = None) -> dict[str, Any]:
    plan = make_plan(model, mask=mask)
    store, watch = PrefixCache.from_spec(cache), Steps()
    with attach(model, plan, seed=0) as attachment:
        if profiler is not None:  # a cached epoch
            train(attachment, rows, tokenizer=model.tokenizer, cache=store,
                  settings=TrainSettings(epochs=1, batch_size=batch))
        with profiler or contextlib.nullcontext():
            result = train(attachment, rows, tokenizer=model.tokenizer, cache=store, callbacks=[watch],
                           settings=TrainSettings(epochs=epochs, batch_size=batch))
    rates = []
    for epoch in range(epochs):
        own = [i for i, s in enumerate(result.steps) if s.epoch == epoch]
        rates.append(sum(result.steps[i].tokens for i in own) / sum(watch.seconds[i] for i in own))
    described = result.describe()
    return {"first": rates[0], "last": rates[-1], "padding": described["padding_share"],
            "losses": result.losses, "parameters": plan.params, "rank": plan.rank}


def choose_rows(model: LoadedModel, spec: str, number: int, max_length: int) -> tuple[list[TokenRow], str]:
    try:
        data = load_data(spec, split="train", samples=number, seed=0)
    except DataError:
        if spec != "gsm8k":
            raise
        data = load_data("arithmetic@4", split="train", samples=number, seed=0)
    rows = tokenize(data, model.tokenizer, max_length=max_length, supervised=True)
    labelled = sum(stop - start for r in rows for start, stop in r.supervised)
    return list(rows), f"{data.name}: {rows.summary()}, {labelled / rows.num_tokens:.0%} labelled"


def contender(name: str, model: LoadedModel, rows: list[TokenRow], batch: int, steps: int) -> dict[str, Any]:
    if name == TRL_ALL:
        return run_trl(model, rows, batch, steps, None)
    if name == TRL_SAME:
        return run_trl(model, rows, batch, steps, segment_blocks("01100", model.anatomy.num_blocks))
    mask = name.split()[1].removesuffix(",")
    alone = name == UNCACHED
    return run_midblock(model, rows, batch, mask, "none" if alone else "memory", 1 if set(mask) == {"1"} else 2)


def share_of(shares: common.Shares, name: str, rate: float) -> str:
    """Share of the products' rate of a contender at these tokens/s of its last epoch."""
    # TRL's LoRA of 01100 has fewer parameters: what these few cost is not what is compared
    mask = "11111" if name == TRL_ALL else "01100" if name == TRL_SAME else name.split()[1].removesuffix(",")
    return shares.of(mask, cached=name.startswith("midblock") and name != UNCACHED, rate=rate)


def in_fresh_process(name: str) -> dict[str, Any]:
    """One contender with the same options; alone in a process, so that its peak memory is its own."""
    done = subprocess.run([sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--only", name],
                          capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="gsm8k", help="arithmetic@4 is used where gsm8k is not at hand")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--masks", default="11111,01100,00100,00110")
    common.add_machine(parser)
    parser.add_argument("--cpu-time", action="store_true",
                        help="count the process's CPU seconds: fair on a busy machine, with --threads 1")
    parser.add_argument("--profile", action="store_true", help="profiler tables instead of the comparison")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    parser.add_argument("--only", help="one contender, as JSON on the last line (used by the comparison)")
    options = parser.parse_args()
    if options.cpu_time:
        Steps.clock = staticmethod(time.process_time)
    common.use_threads(options.threads)
    model = load_model(options.model, dtype=options.dtype, device=options.device)
    rows, described = choose_rows(model, options.data, options.rows, options.max_length)
    steps = -(-len(rows) // options.batch)
    if not options.only:
        print(f"{common.machine(model)}\n{described}; batch {options.batch}, {steps} steps an epoch", flush=True)
    if options.profile:
        show_profiles(model, rows, options.batch)
        return
    if options.only:
        run_midblock(model, rows[:options.batch], options.batch, "00001", "none", 1)  # warm up
        result = contender(options.only, model, rows, options.batch, steps)
        print(json.dumps({**result, "memory": common.peak_bytes() / 2**20}))
        return
    shares = common.Shares(model, rows, options.batch)
    print(f"{shares.rates}\n", flush=True)
    del model
    masks = options.masks.split(",")
    names = [TRL_ALL, TRL_SAME, *(f"midblock {m}" for m in masks)]
    if "01100" in masks:
        names.append(UNCACHED)
    lines: list[dict[str, Any]] = []
    found: dict[str, Any] = {}
    for name in names:
        found[name] = result = in_fresh_process(name)
        print(f"{name}: {result['last']:.0f} tokens/s", file=sys.stderr, flush=True)
        lines.append({"": name, "trainable": result["parameters"], "tokens/s, first epoch": round(result["first"], 1),
                      "tokens/s, cached epoch": round(result["last"], 1),
                      "share of the products' rate": share_of(shares, name, result["last"]),
                      "x TRL all blocks": round(result["last"] / found[TRL_ALL]["last"], 2),
                      "x TRL 01100": round(result["last"] / found[TRL_SAME]["last"], 2) if TRL_SAME in found else None,
                      "padding": f"{result['padding']:.0%}", "peak MiB": round(result["memory"]),
                      "loss, first to last step": f"{result['losses'][0]:.3f} {result['losses'][-1]:.3f}"})
    table = pd.DataFrame(lines)
    common.table("tune", table.fillna("").values.tolist(), list(table.columns))
    print("\nTargets: share of 11111 and 01100 at least 0.65; cached 01100 at least 3 times TRL, 00100 at least 4.")
    if UNCACHED in found:
        worst = max(abs(a - b) / abs(b) for a, b in zip(found["midblock 01100"]["losses"], found[UNCACHED]["losses"],
                                                        strict=True))
        print(f"Largest relative difference of a step's loss, cached against uncached: {worst:.2g}")
    if options.json:
        options.json.write_text(json.dumps({"data": described, "rows": lines, "losses": {
            k: v["losses"] for k, v in found.items()}}, indent=1) + "\n")


def show_profiles(model: LoadedModel, rows: list[TokenRow], batch: int) -> None:
    rows = rows[:3 * batch]
    for name, call in (("TRL + PEFT, all blocks", lambda p: run_trl(model, rows, batch, 3, None, p)),
                       ("midblock 01100, cached epoch", lambda p: run_midblock(model, rows, batch, "01100", "memory",
                                                                              1, p))):
        profiler = profile(activities=[ProfilerActivity.CPU])
        call(profiler)
        averages = profiler.key_averages()
        total = sum(e.self_cpu_time_total for e in averages)
        table = pd.DataFrame([{"operation": e.key, "self s": e.self_cpu_time_total / 1e6,
                               "share": f"{e.self_cpu_time_total / total:.1%}", "calls": e.count}
                              for e in sorted(averages, key=lambda e: -e.self_cpu_time_total)[:16]])
        print_table(table, f"{name}: {total / 1e6:.1f} s of operations in 3 steps")
        within = {e.key: e.cpu_time_total / 1e6 for e in averages}
        for key in ("ChunkedLogProbFunction", "ChunkedLogProbFunctionBackward", "_HeadLoss", "_DenseAttention",
                    "_DenseAttentionBackward", "_LowRank", "_LowRankBackward"):
            if key in within:
                print(f"  within {key}: {within[key]:.1f} s")
        print(flush=True)


if __name__ == "__main__":
    main()
