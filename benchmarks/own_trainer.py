"""TRL's trainer by itself, with midblock's plan, and with its two contexts: tokens per second and peak memory.

One process per contender, the same rows, batches and steps; the first epoch (it fills the prefix cache) is not timed.

    python benchmarks/own_trainer.py [--model smollm2] [--rows 48] [--batch 8] [--length 256] [--epochs 3]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

CONTENDERS = {
    "TRL, all-layer LoRA": ("11111", ()),
    "TRL, midblock's plan 01100": ("01100", ()),
    "+ FrozenPrefix": ("01100", ("prefix",)),
    "+ FrozenPrefix, SupervisedHead": ("01100", ("prefix", "head")),
}


def one(name: str, wanted: argparse.Namespace) -> dict[str, float]:
    """Train and time one contender in this process."""
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import midblock
    from midblock.data import load_data, pad_token_id, tokenize
    from midblock.provenance import peak_memory_bytes
    from midblock.tuning.batching import collator, labels_of

    mask, contexts = CONTENDERS[name]
    loaded = midblock.load_model(wanted.model)
    rows = tokenize(load_data(wanted.data, split="train").sample(wanted.rows, 0), loaded.tokenizer,
                    max_length=wanted.length, supervised=True)
    data = Dataset.from_dict({"input_ids": [list(r.ids) for r in rows], "labels": [labels_of(r) for r in rows]})
    tokens = sum(map(len, rows))
    begun: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            begun.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            loaded.model, train_dataset=data, processing_class=loaded.tokenizer,
            data_collator=collator(pad_token_id(loaded.tokenizer)), peft_config=midblock.lora_config(loaded, mask=mask),
            callbacks=[Clock()], args=SFTConfig(
                output_dir=folder, num_train_epochs=wanted.epochs, per_device_train_batch_size=wanted.batch,
                dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, gradient_checkpointing=False,
                save_strategy="no", report_to="none", bf16=False, disable_tqdm=True, logging_steps=1,
                use_cpu=not torch.cuda.is_available(), dataloader_pin_memory=False))
        with contextlib.ExitStack() as stack:
            if "prefix" in contexts:
                stack.enter_context(midblock.FrozenPrefix(trainer.model, cache="memory"))
            if "head" in contexts:
                stack.enter_context(midblock.SupervisedHead(trainer.model))
            trainer.train()
        ended = time.perf_counter()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    return {"tokens/s": tokens * (wanted.epochs - 1) / (ended - begun[1]), "peak MiB": peak_memory_bytes() / 2**20,
            "first loss": losses[0], "last loss": losses[-1]}


def main() -> None:
    """Run every contender in a process of its own and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.one:
        print("RESULT " + json.dumps(one(wanted.one, wanted)))
        return
    import torch

    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
          f"{torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU'}, {wanted.model}, "
          f"{wanted.rows} rows of {wanted.data}, batches of {wanted.batch}")
    base = None
    for name in CONTENDERS:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", name], capture_output=True, text=True,
                              check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            sys.exit(f"{name}:\n{done.stderr[-3000:]}")
        result = json.loads(found[-1].removeprefix("RESULT "))
        base = base or result["tokens/s"]
        print(f"{name:32s} {result['tokens/s']:8.1f} tokens/s  {result['tokens/s'] / base:5.2f}x  "
              f"{result['peak MiB']:7.0f} MiB  loss {result['first loss']:.4f} -> "
              f"{result['last loss']:.4f}", flush=True)


if __name__ == "__main__":
    main()
