"""TRL's trainer by itself, with midblock's plan, and with its two contexts: tokens per second and peak memory.

One process per contender, the same rows, batches and steps. The first epoch, which fills the prefix cache, is timed
apart from the later ones, which are compared.

    python benchmarks/own_trainer.py [--model smollm2] [--rows 48] [--batch 8] [--length 256] [--epochs 3]
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import _common as common  # first: it mends the import path and sets the environment
from midblock.models import load_model

CONTENDERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "TRL, all-layer LoRA": ("11111", ()),
    "TRL, midblock's plan 01100": ("01100", ()),
    "+ FrozenPrefix": ("01100", ("prefix",)),
    "+ FrozenPrefix, SupervisedHead": ("01100", ("prefix", "head")),
}
TARGET = 2.5


def rows_of(wanted: Any, loaded: Any) -> Any:
    """The training rows, their completions supervised."""
    from midblock.data import load_data, tokenize

    return tokenize(load_data(wanted.data, split="train").sample(wanted.rows, 0), loaded.tokenizer,
                    max_length=wanted.length, supervised=True)


def one(name: str, wanted: Any) -> dict[str, float]:
    """Train and time one contender in this process."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    import midblock
    from midblock.data import pad_token_id
    from midblock.tuning.batching import collator, labels_of

    mask, contexts = CONTENDERS[name]
    loaded = load_model(wanted.model, dtype=wanted.dtype, device=wanted.device)
    rows = rows_of(wanted, loaded)
    data = Dataset.from_dict({"input_ids": [list(r.ids) for r in rows], "labels": [labels_of(r) for r in rows]})
    begun: list[float] = []

    class Clock(TrainerCallback):
        def on_epoch_begin(self, *_: Any, **__: Any) -> None:
            common.synchronize()
            begun.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            loaded.model, train_dataset=data, processing_class=loaded.tokenizer,
            data_collator=collator(pad_token_id(loaded.tokenizer)), peft_config=midblock.lora_config(loaded, mask=mask),
            callbacks=[Clock()], args=SFTConfig(
                output_dir=folder, num_train_epochs=wanted.epochs, per_device_train_batch_size=wanted.batch,
                dataset_kwargs={"skip_prepare_dataset": True}, max_length=None, gradient_checkpointing=False,
                save_strategy="no", report_to="none", bf16=False, disable_tqdm=True, logging_steps=1,
                use_cpu=loaded.device.type == "cpu", dataloader_pin_memory=False))
        with contextlib.ExitStack() as stack:
            if "prefix" in contexts:
                stack.enter_context(midblock.FrozenPrefix(trainer.model, cache="memory"))
            if "head" in contexts:
                stack.enter_context(midblock.SupervisedHead(trainer.model))
            trainer.train()
        common.synchronize()
        ended = time.perf_counter()
    losses = [e["loss"] for e in trainer.state.log_history if "loss" in e]
    tokens = sum(map(len, rows))
    return {"first": tokens / (begun[1] - begun[0]), "later": tokens * (wanted.epochs - 1) / (ended - begun[1]),
            "memory": common.peak_bytes(), "loss first": losses[0], "loss last": losses[-1]}


def main() -> None:
    """Run every contender in a process of its own and print the table."""
    parser = common.argparse.ArgumentParser(description=__doc__,
                                            formatter_class=common.argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--data", default="arithmetic")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=3, help="at least 2: the first fills the cache")
    common.add_machine(parser)
    parser.add_argument("--one", help=common.argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.epochs < 2:
        parser.error("--epochs must be 2 or more: the first fills the cache, the others are compared")
    common.use_threads(wanted.threads)
    if wanted.one:
        print("RESULT " + json.dumps(one(wanted.one, wanted)))
        return
    loaded = load_model(wanted.model, dtype=wanted.dtype, device=wanted.device)
    rows = list(rows_of(wanted, loaded))
    shares = common.Shares(loaded, rows, wanted.batch)
    print(f"{common.machine(loaded)}\n{wanted.data}: {len(rows)} rows, {shares.tokens:,} tokens; batch {wanted.batch}, "
          f"{wanted.epochs} epochs\n{shares.rates}", flush=True)
    del loaded
    lines, base = [], 0.0
    for name, (mask, contexts) in CONTENDERS.items():
        done = subprocess.run([sys.executable, "-W", "ignore", __file__, *sys.argv[1:], "--one", name],
                              capture_output=True, text=True, check=False)
        found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
        if not found:
            sys.exit(f"{name}:\n{done.stderr[-3000:]}")
        result = json.loads(found[-1].removeprefix("RESULT "))
        base = base or result["later"]
        ratio = result["later"] / base
        print(f"{name}: {result['later']:.0f} tokens/s", file=sys.stderr, flush=True)
        lines.append([name, f"{result['first']:.1f}", f"{result['later']:.1f}", f"{ratio:.2f}",
                      shares.of(mask, cached="prefix" in contexts, rate=result["later"]), common.mib(result["memory"]),
                      f"{result['loss first']:.4f} {result['loss last']:.4f}"])
    common.table("own_trainer", lines, ["run", "tokens/s, first epoch", "tokens/s, later epochs", "x TRL all-layer",
                                        "share of the products' rate", "peak memory", "loss, first and last step"])
    print(f"\nTarget: with both contexts at least {TARGET} times TRL all-layer.")


if __name__ == "__main__":
    main()
