"""Lens against the logits of all hidden states of a sample at once.

Yardstick: a batch's states of all depths are collected for each model; then, sample by sample, they are
stacked, put through final norm and head together, and loss, entropy, probability, rank, accuracy, KL and top-k lists
are taken from the full float32 (hidden x tokens x vocabulary) log-probabilities. Same dtype, same
counted tokens, same quantities.

    python benchmarks/lens.py                 # 100 samples of 128 tokens, two models
    python benchmarks/lens.py --samples 4     # a quick look
"""

from __future__ import annotations

import math
import time
from typing import Any

import _common as common

# isort: split
import torch

from midblock.analysis.lens import lens
from midblock.capture import run_blocks
from midblock.data import make_batches, pad_token_id, tokenize


def in_order(logits: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
    """The top-k lists with the lower index first of equal logits, of which bfloat16 makes many; not timed.

    The candidates are the k and all that equal the k-th, as far as 8 k reach.
    """
    k = top.shape[-1]
    values, columns = logits.topk(8 * k, dim=-1)
    columns, order = columns.sort(dim=-1)
    best = values.gather(-1, order).sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return columns.gather(-1, best)


def yardstick(models: list[Any], batches: list[Any], top_k: int) -> tuple[dict[tuple[str, str, int], float], float]:
    """Mean over samples of every quantity, (metric, side, hidden) -> value; and seconds to leave out of its time."""
    total: dict[tuple[str, str, int], float] = {}
    checking = 0.0
    samples = sum(map(len, batches))

    def add(metric: str, side: str, values: torch.Tensor) -> None:
        for h, value in enumerate(values.double().mean(dim=-1).tolist()):
            total[metric, side, h] = total.get((metric, side, h), 0.0) + value / samples

    with torch.inference_mode():
        for batch in batches:
            states: dict[str, list[torch.Tensor]] = {"base": [], "sft": []}
            for side, model in zip(states, models, strict=True):
                run_blocks(model.model, model.anatomy, batch,
                           listener=lambda h, z, kept=states[side]: kept.append(z.clone()))
            for row, length in enumerate(batch.lengths.tolist()):
                target = batch.input_ids[row, 1:length]
                logp, first, tops = {}, {}, {}
                for side, model in zip(states, models, strict=True):
                    hidden = torch.stack([z[row, :length - 1] for z in states[side]])
                    logits = model.anatomy.unembed(hidden).float()
                    first[side] = logits.argmax(dim=-1)
                    logp[side] = logits.log_softmax(dim=-1)
                    tops[side] = logits.topk(top_k, dim=-1).indices
                    paused = time.perf_counter()
                    tops[side] = in_order(logits, tops[side])
                    checking += time.perf_counter() - paused
                    gold = logp[side].gather(-1, target.expand(len(hidden), -1).unsqueeze(-1))
                    rank = (logp[side] > gold).sum(dim=-1)
                    add("loss", side, -gold.squeeze(-1))
                    add("entropy", side, -(logp[side].exp() * logp[side]).sum(dim=-1))
                    add("gold_probability", side, gold.squeeze(-1).exp())
                    add("gold_rank", side, rank)
                    add("accuracy", side, first[side] == target)
                add("kl", "pair", (logp["base"].exp() * (logp["base"] - logp["sft"])).sum(dim=-1))
                add("top1_agreement", "pair", first["base"] == first["sft"])
                add("top_k_overlap", "pair", (tops["base"].unsqueeze(-1) == tops["sft"].unsqueeze(-2))
                    .any(dim=-1).double().mean(dim=-1))
    return total, checking


def main() -> None:
    args = common.parser(__doc__, samples=100).parse_args()
    models = common.load_two(args)
    data = common.exact_length_data(models[0], args.samples, args.tokens)
    settings: dict[str, Any] = {"samples": args.samples, "max_length": args.tokens, "batch_size": args.batch_size}
    drawn = data.sample(args.samples, 0)
    rows = tokenize(drawn, models[0].tokenizer, max_length=args.tokens, min_tokens=2).rows
    batches = make_batches(rows, batch_size=args.batch_size, pad_id=pad_token_id(models[0].tokenizer))
    print(common.machine(models[0]))
    lengths = [len(row) for row in rows]
    rates = common.Rates(models[0], args.batch_size * args.tokens)
    print(rates)
    # every hidden state of both models goes through the head, but for each sample's last token
    work = rates.forward(lengths, head_tokens=(models[0].anatomy.num_blocks + 1) * sum(n - 1 for n in lengths)) * 2
    lens(models, data=data, names=["base", "sft"], **{**settings, "samples": min(2, args.samples)})  # warm up
    yardstick(models, make_batches(rows[:1], batch_size=1, pad_id=0), 10)
    ours, result = common.timed(lambda: lens(models, data=data, names=["base", "sft"], **settings), args.repeats,
                                warm=False)
    theirs, (slow, checking) = common.timed(lambda: yardstick(models, batches, 10), 1, warm=False)
    theirs -= checking
    frame = result.frame
    frame = frame[frame["metric"].isin({m for m, _, _ in slow}) & (frame["side"] != "difference")]
    fast = {(r.metric, r.side, int(r.layer)): float(r.value) for r in frame.itertuples()}
    tokens = 2 * sum(lengths)
    common.table(
        f"lens: {len(rows)} samples of {args.tokens} tokens, 2 models ({models[0].spec}, "
        f"{str(models[0].dtype).removeprefix('torch.')}), every hidden state 0..{models[0].anatomy.num_blocks}",
        [["midblock lens", f"{ours:.1f}", f"{tokens / ours:,.0f}", "1", rates.share(work, ours)],
         ["all hidden states through the head at once", f"{theirs:.1f}", f"{tokens / theirs:,.0f}",
          f"{theirs / ours:.2f}", rates.share(work, theirs)]],
        ["way", "seconds", "tokens/s", "times as long", "share of the products' rate"])
    # one token that flips changes a share by 1 / counted tokens: shares are compared to that floor
    floor = {"accuracy": 1.0, "top1_agreement": 1.0, "top_k_overlap": 1.0, "gold_probability": 1e-2}
    off, where = common.worst_disagreement(fast, slow, floor)
    print(f"\nLargest disagreement of {len(slow)} figures: {off:.2e} relative, at {where}.")
    if not math.isfinite(off) or off > 1e-3:
        raise SystemExit("the two ways disagree by more than 1e-3")
    print(f"lens reaches {rates.share(work, ours)} of the products' rate (target: at least 0.85) and is "
          f"{theirs / ours:.2f} times as fast as the yardstick.")


if __name__ == "__main__":
    main()
