"""The family matrix: every causal family of transformers, made tiny, under every command.

Each command's numbers are compared with plain transformers: one unpadded row at a time, weights really copied,
PEFT's own loading. A command may refuse a family with a reason (a `MidblockError`); a traceback or another number is a
failure.

    python tests/family_matrix.py                        every family, one process for each; done ones are kept
    python tests/family_matrix.py llama bamba            these anew
    python tests/family_matrix.py --page                 docs/families.md from the records alone
"""

from __future__ import annotations

import copy
import json
import math
import os
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDS = HERE / "family_records.jsonl"
PAGE = HERE.parent / "docs" / "families.md"
COMMANDS = ("inspect", "profile", "weights", "lens", "swap", "merge", "gradients", "locate", "tune", "cache", "reload",
            "ranks", "evaluate")
SAMPLES, SECONDS = 4, 600
MASK = "01"
_TITLES = {"cache": "tune with the cache", "reload": "adapter in plain PEFT", "ranks": "tune with EVA's ranks"}


class WrongNumber(AssertionError):
    """A command gave another number than plain transformers."""


def near(got: float, want: float, what: str, rel: float = 1e-4) -> None:
    """Equal up to the rounding of float32 sums through a few blocks."""
    if not math.isclose(got, want, rel_tol=rel, abs_tol=1e-5):
        raise WrongNumber(f"{what}: {got:.7g} where plain transformers gives {want:.7g}")


class World:
    """One family: a base, a tuned copy, rows, and what plain transformers says of them."""

    def __init__(self, family: str, folder: Path) -> None:
        import torch

        from conftest import build_tiny_tokenizer
        from families import tiny
        from midblock.models import save_checkpoint

        self.family, self.folder = family, folder
        self.base = tiny(family)
        self.sft = copy.deepcopy(self.base)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in self.sft.parameters():
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
        for name, model in (("m", self.base), ("m-sft", self.sft)):
            save_checkpoint(model, build_tiny_tokenizer(), folder / name)
        self.data = folder / "d.jsonl"
        self.data.write_text("".join(json.dumps({"prompt": f"what is {i} and {i * i}? ", "completion":
                                                 f"it is {i + i * i}, of course" + " and so on" * (i % 3)}) + "\n"
                                     for i in range(SAMPLES)))

    @cached_property
    def pair(self) -> Any:
        """Both, loaded by midblock."""
        from midblock.models import load_model

        return [load_model(str(self.folder / name)) for name in ("m", "m-sft")]

    @cached_property
    def anatomy(self) -> Any:
        """Of the base."""
        from midblock.models import find_anatomy

        return find_anatomy(self.base)

    def rows(self, *, completions: bool = False) -> Any:
        """Unpadded token rows: whole texts, or prompt, completion and end with the spans that training learns."""
        from midblock.data import load_data, tokenize

        return tokenize(load_data(str(self.data)).sample(SAMPLES, 0), self.pair[0].tokenizer, max_length=256,
                        supervised=completions)

    def logits(self, model: Any, ids: list[int], prompt: int | None = None) -> Any:
        """(T, V) of one row, by the model's own forward; an encoder reads the first ``prompt`` tokens (else all)."""
        import torch

        tokens = torch.tensor([ids])
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        if model.config.is_encoder_decoder:  # the text in the encoder, and shifted right in the decoder
            start = model.config.decoder_start_token_id
            inputs["input_ids"] = tokens[:, :prompt]
            inputs["decoder_input_ids"] = torch.cat([torch.tensor([[start]]), tokens[:, :-1]], dim=1)
        return model(**inputs).logits[0]

    def losses(self, model: Any, row: Any) -> Any:
        """Loss of each counted token of a row: all after the first, or the supervised ones."""
        import torch

        prompt = row.supervised[0][0] if row.supervised else None
        logits, ids = self.logits(model, row.ids, prompt).double(), torch.tensor(row.ids)
        spans = row.supervised or [(0, len(row.ids))]
        places = torch.tensor([t for start, stop in spans for t in range(max(start, 1), stop)])
        # an encoder-decoder's logits at a place are of that token, a decoder's of the next
        shift = 0 if model.config.is_encoder_decoder else 1
        return torch.nn.functional.cross_entropy(logits[places - shift], ids[places], reduction="none")

    def loss(self, model: Any, *, completions: bool = False, per_row: bool = False) -> float:
        """Mean over all tokens together, or over the rows' own means."""
        import torch

        with torch.no_grad():
            found = [self.losses(model, row) for row in self.rows(completions=completions)]
        return float(torch.stack([f.mean() for f in found]).mean() if per_row else torch.cat(found).mean())

    def mixed(self, weight: Callable[[str, Any, Any], Any]) -> Any:
        """A copy of the base whose parameters a function makes of (name, base's, tuned)."""
        import torch

        model = copy.deepcopy(self.base)
        tuned = dict(self.sft.named_parameters())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weight(name, parameter.double(), tuned[name].double()))
        return model


def inspect(w: World) -> None:
    from midblock.models.summary import summarize_model

    found = summarize_model(str(w.folder / "m"))
    near(found.parameters, w.base.num_parameters(), "parameters")
    near(found.num_blocks, w.anatomy.num_blocks, "blocks")


def profile(w: World) -> None:
    import torch

    from midblock import profile as run

    frame = run(w.pair, data=str(w.data), samples=SAMPLES, token_samples=2, batch_size=2).frame
    for side, model in (("base", w.base), ("sft", w.sft)):
        from midblock.models import find_anatomy

        blocks = find_anatomy(model).blocks
        norms: list[list[float]] = [[] for _ in blocks]
        for ids in (r.ids for r in w.rows()):
            seen: dict[int, Any] = {}
            hooks = [b.register_forward_hook(lambda _m, _i, out, n=n, seen=seen: seen.__setitem__(n, out))
                     for n, b in enumerate(blocks)]
            with torch.no_grad():
                w.logits(model, ids)
            for hook in hooks:
                hook.remove()
            for n, out in seen.items():
                z = out[0] if isinstance(out, tuple | list) else out
                norms[n].append(float(z.double().reshape(-1, len(ids), z.shape[-1])[-1].mean(0).norm()))
        for n, values in enumerate(norms):
            row = frame[(frame.metric == "l2_norm") & (frame.layer == n + 1) & (frame.side == side)]
            near(row["value"].item(), sum(values) / len(values), f"{side} hidden {n + 1}")


def weights(w: World) -> None:
    from midblock import weights as run

    frame = run(*(str(w.folder / n) for n in ("m", "m-sft"))).frame
    tuned = dict(w.sft.named_parameters())
    rows = frame[(frame.kind == "block") & (frame.metric == "weight_change")]
    if rows.empty:
        raise WrongNumber("no block was measured")
    known = {n: float((tuned[n].detach().double() - p.detach().double()).norm()) for n, p in w.base.named_parameters()}
    fused = rows[rows["matrix"].str.contains("qkv|kv|gate_up|in_proj")]["tensor"]  # besides their parts
    rows = rows[~rows["tensor"].isin(fused) | rows["matrix"].str.contains("qkv|kv|gate_up|in_proj")]
    parts = rows.assign(square=rows["value"] ** 2).groupby("tensor")["square"].sum()  # fused q, k and v are three rows
    for name, square in parts.items():
        if name in known:  # checkpoints may store what the model fuses
            near(math.sqrt(square), known[name], str(name))


def lens(w: World) -> None:
    from midblock import lens as run

    frame = run(*w.pair, data=str(w.data), samples=SAMPLES, batch_size=2).frame
    last = frame[(frame.layer == w.anatomy.num_blocks) & (frame.metric == "loss")]
    for side, model in (("base", w.base), ("sft", w.sft)):
        near(last[last.side == side]["value"].item(), w.loss(model), f"{side} loss at the last hidden state")


def swap(w: World) -> None:
    from midblock import swap as run
    from midblock.models import find_anatomy
    from midblock.segments import segment_blocks

    def swapped(blocks: set[int]) -> Any:
        model, donor = copy.deepcopy(w.base), copy.deepcopy(w.sft)
        theirs = find_anatomy(donor).blocks
        owner = model.get_submodule(w.anatomy.block_path(0).rpartition(".")[0])
        for b in blocks:  # whole modules, since some families share weights between blocks
            owner[b] = theirs[b]
        return model

    frame = run(*w.pair, data=str(w.data), samples=SAMPLES, batch_size=2, masks=("01", "10")).frame
    for mask in ("00", "01", "10"):
        blocks = set() if mask == "00" else set(segment_blocks(mask, w.anatomy.num_blocks))
        row = frame[(frame.recipient == "base") & (frame["head"] == "base") & (frame.layer == mask)
                    & (frame.metric == "loss") & (frame.side == "base")]
        near(row["value"].item(), w.loss(swapped(blocks)), f"mask {mask}")


def merge(w: World) -> None:
    from midblock import merge as run

    frame = run(*w.pair, alphas=((0.0, 0.5),), alpha_rest=0.25, data=str(w.data), samples=SAMPLES, batch_size=2).frame

    def share(name: str, a: Any, b: Any) -> Any:
        block = w.anatomy.block_of(name)
        alpha = 0.25 if block is None else 0.5 if block >= w.anatomy.num_blocks / 2 else 0.0
        return a + alpha * (b - a)

    row = frame[(frame.metric == "loss") & (frame.side == "merged")]
    if len(row) != 1:
        row = row[row.layer.astype(str).str.contains("0.5")]
    near(row["value"].item(), w.loss(w.mixed(share)), "merged loss")


def gradients(w: World) -> None:
    from midblock import gradients as run
    from midblock.models import find_anatomy

    frame = run(w.pair[0], data=str(w.data), samples=SAMPLES, batch_size=1).frame
    rows = frame[(frame.metric == "gradient_norm") & (frame.matrix == "all")]
    model = copy.deepcopy(w.base).requires_grad_(True)
    want: dict[int, list[float]] = {b: [] for b in range(w.anatomy.num_blocks)}
    for row in w.rows(completions=True):
        model.zero_grad()
        w.losses(model, row).mean().backward()
        for block, module in enumerate(find_anatomy(model).blocks):
            want[block].append(math.sqrt(sum(float(p.grad.double().square().sum()) for p in module.parameters()
                                             if p.grad is not None)))
    for block, values in want.items():
        got = rows[rows.layer == block]["value"]
        if len(got):
            near(got.item(), sum(values) / len(values), f"block {block}", rel=1e-3)


def locate(w: World) -> None:
    from midblock import locate as run

    found = run(w.pair[0], data=str(w.data), samples=SAMPLES)
    if not found.proposals:
        raise WrongNumber("nothing was proposed")


def _tune(w: World, cache: str, out: Path | None = None) -> Any:
    from midblock import tune as run

    return run(w.pair[0], str(w.data), mask=MASK, rank=2, target_modules=("all-linear",), steps=2, batch_size=SAMPLES,
               warmup=0.0, learning_rate=1e-3, cache=cache, out=out)


def tune(w: World) -> None:
    result = _tune(w, "none", w.folder / "tuned")
    w.state = result.state  # type: ignore[attr-defined]
    near(result.training.losses[0], w.loss(w.base, completions=True), "loss of the first step")


def cache(w: World) -> str:
    import torch

    result = _tune(w, "auto")
    before = getattr(w, "state", None)
    if before is None:
        raise WrongNumber("tune did not run")
    for name, tensor in result.state.items():
        if not torch.allclose(tensor, before[name], rtol=1e-3, atol=1e-6):
            raise WrongNumber(f"{name} differs from training without the cache by "
                              f"{float((tensor - before[name]).abs().max()):.2g}")
    off = [n for n in result.notes if "cache" in n]
    return f"off: {off[0]}" if off else "ok"


def ranks(w: World) -> None:
    """EVA's ranks of the linear layers: the directions of most variance within the budget, read back by plain PEFT."""
    import torch

    from midblock import tune as run
    from midblock.tuning import make_plan

    options: dict[str, Any] = {"mask": MASK, "rank": 2, "target_modules": ("linear",)}
    folder = w.folder / "eva"
    plan = run(w.pair[0], str(w.data), ranks="eva", init="eva", steps=2, batch_size=SAMPLES, warmup=0.0,
               learning_rate=1e-3, out=folder, **options).plan
    even = make_plan(w.pair[0], **options)
    if abs(plan.params - even.params) > max(m.cost_per_rank for m in even.modules) / 2:
        raise WrongNumber(f"{plan.params} parameters for a budget of {even.params}")
    seen: dict[str, list[Any]] = {m.name: [] for m in even.modules}
    for row in w.rows(completions=True):
        places = [t for start, stop in row.supervised for t in range(start, stop)]
        hooks = [w.base.get_submodule(m.name).register_forward_pre_hook(
            lambda _m, given, name=m.name, places=places: seen[name].append(
                given[0].double().reshape(-1, given[0].shape[-1])[places])) for m in even.modules]
        with torch.no_grad():
            w.logits(w.base, row.ids, row.supervised[0][0])
        for hook in hooks:
            hook.remove()
    taken, left = [1.0], [0.0]
    for m in even.modules:
        rows = torch.cat(seen[m.name])
        squares = torch.linalg.svdvals(rows - rows.mean(0)) ** 2
        shares = (squares / squares.sum()).tolist()[:min(4, m.inputs, m.outputs)]
        taken += shares[:plan.own_ranks.get(m.name, 0)]
        left += shares[plan.own_ranks.get(m.name, 0):]
    if max(left) > min(taken) + 1e-5:
        raise WrongNumber(f"a direction of {max(left):.4g} of the variance was left for one of {min(taken):.4g}")
    _reads(w, folder / "adapter")


def reload(w: World) -> None:
    _reads(w, w.folder / "tuned" / "adapter")


def _reads(w: World, folder: Path) -> None:
    """Plain PEFT and midblock compute the same with an adapter, and not what the base computes."""
    import torch
    from peft import PeftModel

    from midblock.models import load_model

    if not folder.exists():
        raise WrongNumber("tune wrote no adapter")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain = PeftModel.from_pretrained(copy.deepcopy(w.base), folder).eval()
    if missing := [str(c.message) for c in caught if "missing adapter keys" in str(c.message)]:
        raise WrongNumber(missing[0][:200])
    ours = load_model(str(w.folder / "m"), adapter=str(folder))
    with torch.no_grad():
        for ids in [r.ids for r in w.rows()][:2]:
            a, b = w.logits(plain.base_model.model, ids), w.logits(ours.model, ids)
            base = w.logits(w.base, ids)
            if torch.equal(a, base):
                raise WrongNumber("plain PEFT gives the base's logits")
            scale = float(a.abs().max())
            if float((a - b).abs().max()) > 1e-4 * scale:
                raise WrongNumber(f"logits of the adapter differ from plain PEFT's by {float((a - b).abs().max()):.2g}")


def evaluate(w: World) -> None:
    from midblock import evaluate as run

    found = run(w.pair[0], "answer_loss", data=str(w.data), samples=SAMPLES, batch_size=2)
    value = found.value if isinstance(found.value, float) else found.value.value
    near(value, w.loss(w.base, completions=True, per_row=True), "answer loss")


# ---------------------------------------------------------------------------------------------
# records


def examine(family: str) -> dict[str, Any]:
    """The record of one family: command -> ok, or what happened."""
    import torch

    from families import tiny
    from midblock.errors import MidblockError

    torch.set_num_threads(1)
    begun = time.monotonic()
    record: dict[str, Any] = {"family": family}
    try:
        record["parameters"] = tiny(family).num_parameters()
    except Exception as error:
        return {**record, "not_built": _line(error)}
    with tempfile.TemporaryDirectory() as folder:
        results: dict[str, str] = {}
        try:
            world = World(family, Path(folder))
        except MidblockError as error:
            return {**record, "results": dict.fromkeys(COMMANDS, f"refused: {_line(error, folder)}")}
        except Exception as error:
            return {**record, "results": dict.fromkeys(COMMANDS, f"failed: {_where(error, folder)}")}
        for command in COMMANDS:
            if command in ("cache", "reload") and results["tune"].startswith("refused"):
                results[command] = results["tune"]
                continue
            try:
                results[command] = globals()[command](world) or "ok"
            except MidblockError as error:
                results[command] = f"refused: {_line(error, folder)}"
            except WrongNumber as error:
                results[command] = f"wrong: {_line(error, folder)}"
            except Exception as error:
                results[command] = f"failed: {_where(error, folder)}"
    return {**record, "results": results, "seconds": round(time.monotonic() - begun, 1)}


def _line(error: BaseException, folder: str = "\0") -> str:
    return " ".join(str(error).replace(folder, "").split())[:400] or type(error).__name__


def _where(error: BaseException, folder: str) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "midblock" in f.filename] or frames
    if os.environ.get("MIDBLOCK_DEBUG"):
        traceback.print_exception(error)
    return f"{type(error).__name__} at {Path(ours[-1].filename).name}:{ours[-1].lineno}: {_line(error, folder)}"


def _in_a_process(family: str) -> dict[str, Any]:
    """`examine` in a fork of this process, which has imported everything; a crash or a hang is that family's alone."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "record.json")
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            if not os.environ.get("MIDBLOCK_DEBUG"):
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
            kept.write_text(json.dumps(examine(family)), encoding="utf-8")
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if kept.exists() and (text := kept.read_text(encoding="utf-8")):
            return dict(json.loads(text))
    what = f"took over {SECONDS} s" if status == -signal.SIGALRM else f"the process ended with {status}"
    return {"family": family, "results": dict.fromkeys(COMMANDS, f"failed: {what}")}


def read_records(path: Path = RECORDS) -> dict[str, dict[str, Any]]:
    """Family -> its last record."""
    if not path.exists():
        return {}
    return {r["family"]: r for r in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def write_records(records: dict[str, dict[str, Any]], path: Path = RECORDS) -> None:
    """Records in the order of their names, without what differs between two runs."""
    kept = [{k: v for k, v in records[name].items() if k != "seconds"} for name in sorted(records)]
    path.write_text("".join(json.dumps(r) + "\n" for r in kept), encoding="utf-8")


def families() -> list[str]:
    """Every family of the matrix."""
    from families import causal_types

    return list(dict.fromkeys([*causal_types(), *(f for f in ("gemma3_nested", "t5", "bart_seq2seq"))]))


def main(words: list[str]) -> int:
    """See the module."""
    import lm_eval  # noqa: F401  what every family needs is imported once
    import peft  # noqa: F401
    import torch
    import trl  # noqa: F401

    import midblock.tuning.sft  # noqa: F401

    torch.set_num_threads(1)
    records = read_records()
    if words[:1] != ["--page"]:
        for family in words or [f for f in families() if f not in records]:
            records[family] = _in_a_process(family)
            write_records(records)
            bad = {c: r for c, r in records[family].get("results", {}).items() if not r.startswith("ok")}
            shown = records[family].get("not_built", bad or "ok")
            sys.stdout.write(f"{family} {records[family].get('seconds')} {shown}\n")
            sys.stdout.flush()
    PAGE.write_text(page(records), encoding="utf-8")
    return 0


def page(records: dict[str, dict[str, Any]]) -> str:
    """docs/families.md."""
    built = {f: r["results"] for f, r in records.items() if "results" in r}
    left = {f: r["not_built"] for f, r in records.items() if "not_built" in r}
    reasons: dict[str, int] = {}

    def cell(result: str) -> str:
        if result == "ok":
            return "ok"
        word, _, reason = result.partition(": ")
        return f"{word} [{reasons.setdefault(reason, len(reasons) + 1)}](#reasons)"

    rows = [f"| {family} | " + " | ".join(cell(results.get(c, "")) for c in COMMANDS) + " |"
            for family, results in built.items()]
    clean = sum(all(r == "ok" for r in results.values()) for results in built.values())
    titles = " | ".join(_TITLES.get(c, c) for c in COMMANDS)
    notes = [f"{number}. {reason.replace('|', '&#124;')}" for reason, number in reasons.items()]
    return "\n".join([
        "# Model families", "",
        f"Every causal family of transformers {_version()} that can be built tiny ({len(built)}), T5 and BART as "
        "sequence-to-sequence models, under every command. Each number is compared with plain transformers: one "
        "unpadded row at a time, weights really copied, gradients by plain autograd, the adapter loaded by plain PEFT. "
        f"{clean} families pass all commands with the prefix cache on.", "",
        "**ok**: the numbers agree. **off**: the prefix cache turns itself off, and training without it is exact. "
        "**refused**: the command says in one line why it cannot be done. Nothing ends in a traceback. The models are "
        "random and have about 50,000 parameters: what is shown is that the arithmetic is right, not that any "
        "published checkpoint was tried.", "",
        "`python tests/family_matrix.py FAMILY...` runs families anew and writes this page.", "",
        f"| family | {titles} |", "|---" * (len(COMMANDS) + 1) + "|", *rows, "",
        "## Reasons", "", *notes, "",
        "## Not built", "",
        "Families that need other inputs than text, or whose text model stands under a name of its own.", "",
        "| family | why |", "|---|---|", *(f"| {f} | {why.replace('|', '&#124;')} |" for f, why in left.items()), ""])


def _version() -> str:
    import transformers

    return transformers.__version__


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
