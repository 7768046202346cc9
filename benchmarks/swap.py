"""Swap against one full evaluation for each swap and head, with weights really copied.

Yardstick: for each direction, mask and head a model gets the donor's blocks (``load_state_dict``), the
chosen final norm and head, and all samples go through its whole forward, with the model's own full
logits. K=5 singles, both heads, both directions: 20 evaluations and 4 of nothing swapped.

    python benchmarks/swap.py                 # 50 samples of 128 tokens, K = 5
    python benchmarks/swap.py --samples 4
"""

from __future__ import annotations

import copy
from typing import Any

import _common as common

# isort: split
import torch

from midblock.analysis.swap import swap
from midblock.capture import counted_positions, model_inputs
from midblock.data import Batch, make_batches, pad_token_id, tokenize
from midblock.segments import all_masks_single, segment_blocks


def evaluate(model: Any, batches: list[Batch]) -> tuple[float, float]:
    """Mean loss and accuracy over all counted tokens, from the model's own logits of the whole batch."""
    losses, right = [], []
    for batch in batches:
        logits = model(**model_inputs(model, batch)).logits.float()
        mask = counted_positions(batch)
        target = batch.input_ids.roll(-1, dims=1)[mask]
        kept = logits[mask]
        loss = torch.nn.functional.cross_entropy(kept, target, reduction="none")
        losses.append(loss.double())
        right.append((kept.argmax(dim=-1) == target).double())
    return torch.cat(losses).mean().item(), torch.cat(right).mean().item()


def yardstick(models: list[Any], batches: list[Batch], masks: list[str]) -> dict[tuple[Any, ...], float]:
    """(metric, recipient, donor, head, mask) -> mean over samples."""
    by_name = dict(zip(("base", "sft"), models, strict=True))
    found: dict[tuple[Any, ...], float] = {}
    scratch = copy.deepcopy(models[0].model)  # own weights, tied or not: head and norm are loaded one by one
    from midblock.models import find_anatomy

    anatomy = find_anatomy(scratch)
    if anatomy.tied:
        anatomy.head.weight = torch.nn.Parameter(anatomy.head.weight.detach().clone())
    with torch.inference_mode():
        for recipient, donor in (("base", "sft"), ("sft", "base")):
            for mask in ["0" * len(masks[0]), *masks]:
                swapped = set(segment_blocks(mask, anatomy.num_blocks)) if "1" in mask else set()
                for head in ("base", "sft"):
                    own = by_name[recipient].anatomy
                    for b, block in enumerate(anatomy.blocks):
                        source = by_name[donor].anatomy if b in swapped else own
                        block.load_state_dict(source.blocks[b].state_dict())
                    anatomy.embeddings.load_state_dict(own.embeddings.state_dict())
                    chosen = by_name[head].anatomy
                    if anatomy.final_norm is not None:
                        anatomy.final_norm.load_state_dict(chosen.final_norm.state_dict())
                    anatomy.head.load_state_dict(chosen.head.state_dict())
                    loss, accuracy = evaluate(scratch, batches)
                    found["loss", recipient, donor, head, mask] = loss
                    found["accuracy", recipient, donor, head, mask] = accuracy
    return found


def main() -> None:
    made = common.parser(__doc__, samples=50)
    made.add_argument("--segments", type=int, default=5, help="K (default: %(default)s)")
    args = made.parse_args()
    models = common.load_two(args)
    data = common.exact_length_data(models[0], args.samples, args.tokens)
    settings: dict[str, Any] = {"samples": args.samples, "max_length": args.tokens, "segments": args.segments,
                                "batch_size": args.batch_size}
    rows = tokenize(data.sample(args.samples, 0), models[0].tokenizer, max_length=args.tokens, min_tokens=2).rows
    batches = make_batches(rows, batch_size=args.batch_size, pad_id=pad_token_id(models[0].tokenizer))
    masks = all_masks_single(args.segments)
    print(common.machine(models[0]))
    lengths = [len(row) for row in rows]
    rates = common.Rates(models[0], args.batch_size * args.tokens)
    print(rates)
    swap(models, data=data, names=["base", "sft"], **{**settings, "samples": min(2, args.samples)})  # warm up
    ours, result = common.timed(lambda: swap(models, data=data, names=["base", "sft"], **settings), args.repeats,
                                warm=False)
    theirs, slow = common.timed(lambda: yardstick(models, batches, masks), 1, warm=False)
    frame = result.frame
    frame = frame[frame["metric"].isin(["loss", "accuracy"]) & (frame["side"] != "difference")]
    fast = {(r.metric, r.recipient, r.donor, r.head, r.layer): float(r.value) for r in frame.itertuples()}
    evaluations = len(slow) // 2
    # the yardstick's passes, and the least that these swaps have in common: blocks below a swap are the recipient's own
    whole = rates.forward(lengths, head_tokens=sum(n - 1 for n in lengths)) * evaluations
    blocks = models[0].anatomy.num_blocks
    firsts = [segment_blocks(mask, blocks)[0] for mask in masks]
    run = 2 * (blocks + sum(blocks - first for first in firsts))
    least = common.Work(rates.block(lengths, 0) * run, whole.head)
    common.table(
        f"swap: K={args.segments}, both directions, both heads, {len(rows)} samples of {args.tokens} tokens "
        f"({models[0].spec}, {str(models[0].dtype).removeprefix('torch.')})",
        [["midblock swap", f"{ours:.1f}", "1", str(run), rates.share(least, ours)],
         [f"{evaluations} full evaluations of copied weights", f"{theirs:.1f}", f"{theirs / ours:.2f}",
          str(blocks * evaluations), rates.share(whole, theirs)]],
        ["way", "seconds", "times as long", "blocks run", "share of the products' rate"])
    off, where = common.worst_disagreement(fast, slow, {"accuracy": 1.0})
    print(f"\nLargest disagreement of {len(slow)} figures: {off:.2e} relative, at {where}.")
    if not off <= 1e-3:
        raise SystemExit("the two ways disagree by more than 1e-3")
    print(f"swap is {theirs / ours:.2f} times as fast (target: at least 2.5).")


if __name__ == "__main__":
    main()
