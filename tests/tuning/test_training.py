"""Training: what moves, what stays, exact resumption, kernels that change nothing."""

from __future__ import annotations

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from families import BLOCKS, DECODER_ONLY, FAMILIES, PAD, token_ids
from midblock.data import TokenRow
from midblock.errors import (
    AdapterError,
    CacheRefusedError,
    DataError,
    OutputError,
    SettingsError,
    TrainingError,
)
from midblock.models import find_anatomy
from midblock.models.attention import can_pack, dense_attention, worth_packing
from midblock.tuning import (
    PrefixCache,
    StepLog,
    TrainResult,
    TrainSettings,
    attach,
    check_engagement,
    frozen_digests,
    make_plan,
    train,
)
from midblock.tuning.batching import batch_plan
from midblock.tuning.cache_folder import CacheFolder
from midblock.tuning.checkpoints import BEGUN, last_checkpoint, load_tree
from midblock.tuning.kernels import has_plain_head, lean_lora, supervised_loss

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

FAST = TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2)


def rows(n: int = 10) -> list[TokenRow]:
    """Rows whose second half repeats the first: something to learn."""
    made = []
    for i in range(n):
        half = token_ids(1, 4 + i % 5, seed=i % 4)[0].tolist()
        made.append(TokenRow(i, (*half, *half, 2), ((len(half), 2 * len(half) + 1),)))
    return made


def digest(model: nn.Module) -> dict[str, Tensor]:
    return {n: t.clone() for n, t in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], before[n]) for n in before)
    assert all("forward" not in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("method", ["lora", "dora", "full"])
@pytest.mark.parametrize("family", ["llama_tied", "gpt2", "gemma2", "qwen3_moe", "t5"])
def test_only_the_plan_moves_and_the_base_comes_back(family: str, method: str, tiny_tokenizer: Any) -> None:
    model = FAMILIES[family]()
    before, flags = digest(model), [p.requires_grad for p in model.parameters()]
    config = model.config.to_json_string()
    plan = make_plan(model, mask="0010", method=method, **({} if method == "full" else {"rank": 4}))
    with attach(model, plan) as attachment:
        frozen = frozen_digests(attachment)
        result = train(attachment, rows(), tokenizer=tiny_tokenizer, settings=FAST)
        assert sum(result.losses[-3:]) < sum(result.losses[:3])
        report = check_engagement(attachment, frozen, token_ids(2, 10)).require()
        assert {u.block for u in report.updates} == {2}
        assert {u.name for u in report.updates} == {m.name for m in plan.modules}
        assert all(u.relative > 0 for u in report.updates)
    assert_unchanged(model, before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not model.training
    assert json.loads(model.config.to_json_string()) == json.loads(config)


def test_whole_blocks_of_a_bfloat16_model_train_in_float32(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]().bfloat16()
    before = digest(model)
    plan = make_plan(model, mask="0001", method="full", target_modules=["all"])
    with attach(model, plan) as attachment:
        assert {p.dtype for p in attachment.trainable.values()} == {torch.float32}
        result = train(attachment, rows(), tokenizer=tiny_tokenizer,
                       settings=TrainSettings(epochs=4, batch_size=4, learning_rate=1e-3))
        assert result.losses[-1] < result.losses[0]
        with attachment.disabled(), torch.no_grad():
            assert torch.equal(model(token_ids()).logits, FAMILIES["llama"]().bfloat16()(token_ids()).logits)
    assert_unchanged(model, before)


def test_arms_start_alike_where_they_meet() -> None:
    model = FAMILIES["llama"]()
    states = {}
    for name, options in {"two": {"mask": "0110", "rank": 4}, "one": {"mask": "0010", "rank": 8}}.items():
        with attach(model, make_plan(model, **options), seed=3) as attachment:
            states[name] = attachment.state()
    key = "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight"
    assert torch.equal(states["one"][key][:4], states["two"][key])
    bound = 32 ** -0.5
    assert states["one"][key].abs().max() <= bound
    assert states["one"][key].std() == pytest.approx(bound / math.sqrt(3), rel=0.15)
    others = [v for k, v in states["two"].items() if "lora_A" in k and v.shape == states["two"][key].shape and k != key]
    assert not any(torch.equal(states["two"][key], v) for v in others)
    with attach(model, make_plan(model, mask="0010", rank=8), seed=4) as attachment:
        assert not torch.equal(attachment.state()[key], states["one"][key])


def test_random_numbers_of_the_caller_go_on_as_before(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    torch.manual_seed(7)
    want = torch.rand(3)
    torch.manual_seed(7)
    with attach(model, make_plan(model, mask="0010", rank=2)) as attachment:
        train(attachment, rows(), tokenizer=tiny_tokenizer, settings=TrainSettings(steps=2, batch_size=4))
    assert torch.equal(torch.rand(3), want)


def run(tokenizer: Any, **options: Any) -> tuple[list[float], dict[str, Tensor], Any]:
    model = options.pop("model", None) or FAMILIES["llama"]()
    settings = options.pop("settings", FAST)
    with attach(model, make_plan(model, mask="0010", rank=4), dropout=options.pop("dropout", 0.0)) as attachment:
        result = train(attachment, rows(), tokenizer=tokenizer, settings=settings, **options)
        return result.losses, attachment.state(), result


def test_the_cache_changes_no_loss_and_no_weight(tiny_tokenizer: Any, tmp_path: Path) -> None:
    want, state, _ = run(tiny_tokenizer, cache="none")
    for cache in ("memory", f"disk:{tmp_path}", PrefixCache(limit_bytes=1500)):
        losses, other, result = run(tiny_tokenizer, cache=cache)
        assert losses == pytest.approx(want, rel=1e-6)
        assert all((other[n] - state[n]).abs().max() <= 1e-6 for n in state)
        assert result.prefix["rows_from_cache"] > 0


def test_rows_of_a_disk_cache_are_read_a_step_ahead(tiny_tokenizer: Any, tmp_path: Path,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    want, state, _ = run(tiny_tokenizer, cache="memory")
    read = CacheFolder.read
    found: list[str] = []

    def watched(self: CacheFolder, *key: str) -> Tensor | None:
        row = read(self, *key)
        if row is not None:
            found.append(threading.current_thread().name)
        return row

    monkeypatch.setattr(CacheFolder, "read", watched)
    losses, other, result = run(tiny_tokenizer, cache=f"disk:{tmp_path}")
    assert losses == want
    assert all(torch.equal(other[n], state[n]) for n in state)
    ahead = sum(name.startswith("midblock-rows") for name in found)
    # the first batch of an epoch is asked for when the one before it ran already
    assert ahead == len(found) == result.prefix["rows_from_cache"] > 0


def test_lean_kernels_change_nothing_in_float32(tiny_tokenizer: Any) -> None:
    want, state, _ = run(tiny_tokenizer)
    losses, other, _ = run(tiny_tokenizer, settings=TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2,
                                                                 lean=False))
    assert losses == pytest.approx(want, rel=1e-5)
    assert all(torch.allclose(other[n], state[n], atol=1e-5) for n in state)


def test_gradient_checkpointing_and_accumulation(tiny_tokenizer: Any) -> None:
    want, state, _ = run(tiny_tokenizer)
    losses, other, _ = run(tiny_tokenizer, settings=TrainSettings(
        epochs=3, batch_size=4, learning_rate=1e-2, gradient_checkpointing=True))
    assert losses == pytest.approx(want, rel=1e-5)
    assert all(torch.allclose(other[n], state[n], atol=1e-5) for n in state)
    model = FAMILIES["llama"]()
    accumulated, _, result = run(tiny_tokenizer, model=model, settings=TrainSettings(
        steps=4, batch_size=2, accumulate=2, learning_rate=1e-2))
    assert len(accumulated) == 4
    assert result.steps[0].supervised == sum(s for s in (r.supervised for r in result.steps[:1]))
    # the first step's loss is the mean over all labelled tokens of both forwards
    order = batch_plan([len(r) for r in rows()], 2, 0)
    assert len(order) == 5
    assert not getattr(model, "is_gradient_checkpointing", False)


def test_the_loss_is_the_models_own(tiny_tokenizer: Any) -> None:
    made = rows(6)
    width = max(map(len, made))
    ids, labels, mask = torch.zeros(6, width, dtype=torch.long), torch.full((6, width), -100), torch.zeros(
        6, width, dtype=torch.long)
    for i, row in enumerate(made):
        lo, hi = row.supervised[0]
        ids[i, :len(row)], mask[i, :len(row)] = torch.tensor(row.ids), 1
        labels[i, lo:hi] = torch.tensor(row.ids[lo:hi])
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    for family in ("llama", "llama_tied", "gemma2", "gemma3", "granite", "cohere", "gpt2", "opt", "qwen3_moe"):
        model = FAMILIES[family]()
        model.requires_grad_(False)
        anatomy = find_anatomy(model)
        weight = anatomy.blocks[1].parameters().__next__().requires_grad_(True)
        plain = has_plain_head(anatomy)
        assert plain == (family not in ("gemma2", "granite", "cohere"))
        want = model(**inputs).loss
        got = supervised_loss(anatomy, inputs, plain=plain)
        assert got.item() == pytest.approx(want.item(), rel=1e-6), family
        theirs, = torch.autograd.grad(want, weight)
        mine, = torch.autograd.grad(got, weight)
        assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max(), family
        half = supervised_loss(anatomy, inputs, plain=plain, count=2 * int((labels[:, 1:] != -100).sum()))
        assert half.item() == pytest.approx(want.item() / 2, rel=1e-6)


def test_lean_lora_in_bfloat16_is_as_near_to_float32_as_peft_is() -> None:
    ids = token_ids(4, 24)
    mask = torch.ones_like(ids)
    mask[2, 15:] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}

    def gradients(dtype: torch.dtype, lean: bool) -> Tensor:
        model = FAMILIES["llama"]().to(dtype)
        made = get_peft_model(model, make_plan(model, mask="0110", rank=4).lora_config(model))
        generator = torch.Generator().manual_seed(0)
        for _name, parameter in made.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
        if lean:
            with lean_lora(made) as count, dense_attention(made) as dense:
                assert count == 8
                assert dense
                made(**inputs).loss.backward()
        else:
            made(**inputs).loss.backward()
        return torch.cat([p.grad.flatten() for p in made.parameters() if p.grad is not None])

    exact = gradients(torch.float32, lean=False)
    assert torch.allclose(gradients(torch.float32, lean=True), exact, rtol=1e-4, atol=1e-6)
    usual = (gradients(torch.bfloat16, lean=False) - exact).norm() / exact.norm()
    ours = (gradients(torch.bfloat16, lean=True) - exact).norm() / exact.norm()
    assert ours <= 1.5 * usual + 1e-3


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "mistral", "gpt_neox"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_dense_attention_is_attention(family: str, side: str) -> None:
    """Against PyTorch's kernel on the same bfloat16 inputs, through padding, windows and head groups."""
    length = 150  # more than one group of queries
    ids = token_ids(2, length)
    mask = torch.ones_like(ids)
    mask[1, (slice(100, None) if side == "right" else slice(0, 50))] = 0
    model = FAMILIES[family](sliding_window=16) if family == "mistral" else FAMILIES[family]()
    exact = model(input_ids=ids, attention_mask=mask).logits.detach()[mask.bool()]
    model.bfloat16()
    usual = model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    with dense_attention(model) as applies:
        assert applies
        ours = model(input_ids=ids, attention_mask=mask).logits[mask.bool()].float()
    scale = exact.norm()
    assert (ours - exact).norm() / scale <= 1.3 * (usual - exact).norm() / scale + 1e-3
    assert model.config._attn_implementation == "sdpa"


def padded_batch(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    ids = token_ids(len(lengths), max(lengths))
    mask = torch.zeros_like(ids)
    for i, n in enumerate(lengths):
        mask[i, :n] = 1
    ids[mask == 0] = PAD
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.mark.parametrize("family", [f for f in DECODER_ONLY if f not in ("gemma2", "granite", "cohere")])
def test_leaving_padding_out_changes_no_loss_and_no_gradient(family: str) -> None:
    """gemma2, granite and cohere change their logits behind the head and keep the model's own forward."""
    inputs = padded_batch((4, 2, 3, 4))  # within the tiny families' windows
    seen: list[tuple[int, ...]] = []

    def run(dtype: torch.dtype, packed: bool) -> tuple[float, Tensor]:
        model = FAMILIES[family]().to(dtype)
        anatomy = find_anatomy(model)
        with dense_attention(model) as applies:
            assert applies
            assert can_pack(anatomy)
            assert worth_packing(anatomy, inputs["attention_mask"])
            handle = anatomy.embeddings.register_forward_hook(lambda m, a, o: seen.append(tuple(o.shape[:2])))
            loss = supervised_loss(anatomy, inputs, plain=True, packed=packed)
            handle.remove()
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().float() for n, p in model.named_parameters()
                                       if p.grad is not None])

    exact = run(torch.float32, False)
    got = run(torch.float32, True)
    assert seen == [(4, 4), (1, 13)]
    assert got[0] == pytest.approx(exact[0], rel=1e-6)
    assert (got[1] - exact[1]).norm() <= 1e-5 * exact[1].norm()
    usual, ours = (run(torch.bfloat16, packed) for packed in (False, True))
    assert ours[0] == pytest.approx(exact[0], rel=2e-2)
    assert (ours[1] - exact[1]).norm() <= 1.3 * (usual[1] - exact[1]).norm() + 1e-2 * exact[1].norm()


def test_rows_are_packed_only_where_nothing_else_mixes_them() -> None:
    mask = padded_batch((9, 4))["attention_mask"]
    windowed = find_anatomy(FAMILIES["mistral"](sliding_window=8))
    assert not worth_packing(windowed, mask)  # 9 tokens, a window of 8
    assert worth_packing(windowed, mask[:, 1:])
    assert not worth_packing(windowed, torch.ones(2, 5))
    assert not worth_packing(windowed, mask[:, 1:].flip(1))  # padding on the left
    llama = FAMILIES["llama"]()
    assert not can_pack(find_anatomy(llama))  # the usual attention is not told where rows begin
    t5 = FAMILIES["t5"]()
    with dense_attention(t5) as applies:
        assert not applies
    # a short convolution looks over the border of rows
    from transformers import Lfm2Config, Lfm2ForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixed = Lfm2ForCausalLM(Lfm2Config(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"])).eval()
    with dense_attention(mixed) as applies:
        assert applies
        assert not can_pack(find_anatomy(mixed))


@pytest.mark.parametrize("order", ["length", "random"])
def test_training_without_padding_is_training(order: str, tiny_tokenizer: Any) -> None:
    settings = TrainSettings(epochs=3, batch_size=4, learning_rate=1e-2, order=order)  # type: ignore[arg-type]
    usual, state, slow = run(tiny_tokenizer, settings=settings.replace(lean=False))
    losses, other, fast = run(tiny_tokenizer, settings=settings)
    assert losses == pytest.approx(usual, rel=1e-5)
    assert all(torch.allclose(other[n], state[n], atol=1e-5) for n in state)
    assert [s.tokens for s in fast.steps] == [s.tokens for s in slow.steps] == [s.padded for s in fast.steps]
    assert sum(s.padded for s in slow.steps) > sum(s.tokens for s in slow.steps)
    assert fast.prefix["rows_from_cache"] == 20  # all but the first epoch


def test_eos_is_learned(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    prompt = torch.tensor([rows()[0].ids[: 2 * rows()[0].supervised[0][0]]])
    with attach(model, make_plan(model, mask="1111", rank=16)) as attachment:
        train(attachment, rows(), tokenizer=tiny_tokenizer,
              settings=TrainSettings(epochs=40, batch_size=4, learning_rate=2e-2))
        with torch.no_grad():
            assert attachment.model(prompt).logits[0, -1].argmax() == 2


# ---------------------------------------------------------------------------------------------
# data order


def test_batches_have_like_lengths_and_are_the_same_in_every_epoch() -> None:
    lengths = [(7 * i) % 23 + 1 for i in range(50)]
    batches = batch_plan(lengths, 8, seed=1)
    assert sorted(i for b in batches for i in b) == list(range(50))
    assert [len(b) for b in batches] == [8] * 6 + [2]
    spans = [(min(lengths[i] for i in b), max(lengths[i] for i in b)) for b in batches]
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    assert batches == batch_plan(lengths, 8, seed=1)
    assert batch_plan([5] * 20, 4, seed=1) != batch_plan([5] * 20, 4, seed=2)
    drawn = batch_plan(lengths, 8, seed=1, order="random")
    assert sorted(i for b in drawn for i in b) == list(range(50))
    assert sum(max(lengths[i] for i in b) for b in drawn) > sum(b for _, b in spans)  # more padding


def test_every_epoch_sees_every_row_in_another_order(tiny_tokenizer: Any) -> None:
    _, _, result = run(tiny_tokenizer, settings=TrainSettings(epochs=4, batch_size=2, learning_rate=1e-3))
    tokens = [[s.tokens for s in result.steps if s.epoch == e] for e in range(4)]
    assert all(sorted(t) == sorted(tokens[0]) for t in tokens)
    assert len({tuple(t) for t in tokens}) > 1
    assert sum(tokens[0]) == sum(map(len, rows()))


# ---------------------------------------------------------------------------------------------
# interruptions


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_resuming_gives_the_result_of_an_uninterrupted_run(dropout: float, tiny_tokenizer: Any, tmp_path: Path) -> None:
    want, state, _ = run(tiny_tokenizer, dropout=dropout, folder=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(what: str, done: float, total: float, note: str = "") -> None:
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        run(tiny_tokenizer, dropout=dropout, folder=tmp_path / "cut", save_steps=2, progress=stop)
    found, wrong = last_checkpoint(tmp_path / "cut")
    assert found is not None
    assert wrong == []
    assert found.name == "checkpoint-4"
    half = tmp_path / "cut" / "checkpoint-5"  # killed while it was being written
    half.mkdir()
    (half / "trainer_state.json").write_text("{")
    (half / BEGUN).write_text("{}")
    mine = tmp_path / "cut" / "checkpoint-3"  # somebody's own
    mine.mkdir()
    (mine / "notes").write_text("mine")
    losses, other, result = run(tiny_tokenizer, dropout=dropout, folder=tmp_path / "cut", save_steps=2, resume=True)
    assert result.resumed_from == 4
    assert not half.exists()
    assert (mine / "notes").read_text() == "mine"
    assert losses == pytest.approx(want, rel=1e-6)
    assert all(torch.equal(other[n], state[n]) for n in state)
    again, final, _ = run(tiny_tokenizer, dropout=dropout, folder=tmp_path / "cut", save_steps=2, resume=True)
    assert again == losses
    assert all(torch.equal(final[n], state[n]) for n in state)


_SCRIPT = """
import sys, time
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
import torch
from conftest import build_tiny_tokenizer
from families import FAMILIES
from test_training import FAST, rows
from midblock.tuning import attach, make_plan, train
model = FAMILIES["llama"]()
def slow(what, done, total, note=""):
    print("step", int(done), flush=True)
    time.sleep(0.3)
with attach(model, make_plan(model, mask="0010", rank=4)) as attachment:
    train(attachment, rows(), tokenizer=build_tiny_tokenizer(), settings=FAST, folder={folder!r}, save_steps=1,
          resume=True, progress=slow)
"""


def test_a_killed_process_is_resumed_exactly(tiny_tokenizer: Any, tmp_path: Path) -> None:
    want, state, _ = run(tiny_tokenizer)
    here = Path(__file__).resolve().parent
    script = _SCRIPT.format(tests=str(here.parent), here=str(here), folder=str(tmp_path / "run"))
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True,
                               env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)})
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 4"):
            break
    time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    losses, other, result = run(tiny_tokenizer, folder=tmp_path / "run", save_steps=1, resume=True)
    assert 2 <= result.resumed_from <= 4
    assert losses == pytest.approx(want, rel=1e-6)
    assert all(torch.equal(other[n], state[n]) for n in state)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(tiny_tokenizer: Any, tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    before = digest(model)

    def poison(what: str, done: float, total: float, note: str = "") -> None:
        if done == 5:  # as an exploding update would
            next(iter(attachment.trainable.values())).data.fill_(float("inf"))

    with attach(model, make_plan(model, mask="0010", rank=4)) as attachment:
        with pytest.raises(TrainingError, match=r"loss became nan in step 6.*last good state is .*checkpoint-4"):
            train(attachment, rows(), tokenizer=tiny_tokenizer, settings=FAST, folder=tmp_path, save_steps=2,
                  progress=poison)
        found, _ = last_checkpoint(tmp_path)
        assert found is not None
        saved = load_tree(found / "optimizer")["optimizer"]
        assert all(torch.isfinite(v).all() for s in saved["state"].values() for v in s.values())
    assert_unchanged(model, before)


def test_a_huge_learning_rate_is_reported(tiny_tokenizer: Any) -> None:
    with pytest.raises(TrainingError, match="lower learning rate"):
        run(tiny_tokenizer, settings=TrainSettings(epochs=30, batch_size=4, learning_rate=1e30, max_grad_norm=0,
                                                   warmup=0))


# ---------------------------------------------------------------------------------------------
# refusals


def test_a_cache_asked_for_by_name_is_not_given_up_silently(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"](attention_dropout=0.1)
    model.train()
    with pytest.raises(CacheRefusedError, match="attention_dropout"):
        run(tiny_tokenizer, model=model, cache="memory")
    model = FAMILIES["llama"](attention_dropout=0.1)
    _, _, result = run(tiny_tokenizer, model=model)
    assert "cache off" in result.notes[0]


def test_mistakes(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    plan = make_plan(model, mask="0010", rank=2)
    with attach(model, plan) as attachment:
        with pytest.raises(DataError, match="no row"):
            train(attachment, [], tokenizer=tiny_tokenizer)
        with pytest.raises(SettingsError, match="TRL does not accept"):
            train(attachment, rows(), tokenizer=tiny_tokenizer, colour="blue")
        with pytest.raises(AdapterError, match="carries an adapter"), attach(model, plan):
            pass
        with pytest.raises(AdapterError, match="another plan"):
            attachment.load_state({"x": torch.zeros(1)})
    with pytest.raises(AdapterError, match="another model"), attach(FAMILIES["gpt2"](), plan):
        pass
    for wrong in ({"epochs": 0}, {"steps": 0}, {"learning_rate": -1.0}, {"batch_size": 0}, {"warmup": 1.0},
                  {"schedule": "steep"}, {"learning_rate": float("nan")}):
        with pytest.raises(SettingsError, match=r"must be|is not one of"):
            TrainSettings(**wrong)


def test_the_check_finds_what_did_not_engage_and_what_should_not_have_moved() -> None:
    model = FAMILIES["llama"]()
    with attach(model, make_plan(model, mask="0010", rank=2)) as attachment:
        frozen = frozen_digests(attachment)
        report = check_engagement(attachment, frozen, token_ids(1, 6))
        assert not report.ok
        assert any("did not move" in p for p in report.problems)
        assert any("logits are those of the base" in p for p in report.problems)
        for name, parameter in attachment.trainable.items():
            if "lora_B" in name:
                parameter.data.fill_(0.1)
        assert check_engagement(attachment, frozen, token_ids(1, 6)).ok
        embeddings = attachment.anatomy.embeddings.weight
        original = embeddings.data.clone()
        embeddings.data[5, 0] += 1e-3
        with pytest.raises(AdapterError, match=r"1 tensors outside the plan changed.*embed_tokens"):
            check_engagement(attachment, frozen, token_ids(1, 6)).require()
        embeddings.data.copy_(original)
    assert BLOCKS == 4


def test_states_go_back_in(tiny_tokenizer: Any) -> None:
    model = FAMILIES["llama"]()
    for method in ("lora", "full"):
        plan = make_plan(model, mask="0010", method=method, **({"rank": 2} if method == "lora" else {}))
        with attach(model, plan) as attachment:
            train(attachment, rows(), tokenizer=tiny_tokenizer, settings=FAST)
            state = attachment.state()
            want = attachment.model(token_ids()).logits.detach()
        with attach(model, plan, seed=9) as attachment:
            attachment.load_state(state)
            assert torch.equal(attachment.model(token_ids()).logits, want)


# ---------------------------------------------------------------------------------------------
# what lies on disk


def cut_run(folder: Path, tokenizer: Any) -> tuple[list[float], dict[str, Tensor]]:
    """A run of 9 steps with checkpoints at 2, 4, 6, 8 that stopped in step 9; and what the whole run gives."""
    losses, state, _ = run(tokenizer)

    class Stop(Exception):
        pass

    def stop(what: str, done: float, total: float, note: str = "") -> None:
        if done == 9:
            raise Stop

    with pytest.raises(Stop):
        run(tokenizer, folder=folder, save_steps=2, progress=stop)
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]
    return losses, state


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)


CHECKPOINT_FAULTS: dict[str, Any] = {
    "a bit of the adapter": lambda c: flip(c / "adapter_model.safetensors"),
    "a bit of the optimizer": lambda c: flip(c / "optimizer.safetensors"),
    "the adapter cut": lambda c: (c / "adapter_model.safetensors").write_bytes(b"\x10"),
    "the state gone": lambda c: (c / "trainer_state.json").unlink(),
    "the seal edited": lambda c: (c / "midblock_complete.json").write_text(
        (c / "midblock_complete.json").read_text().replace('"step": 8', '"step": 7')),
    "the seal empty": lambda c: (c / "midblock_complete.json").write_text(""),
    "the seal binary": lambda c: (c / "midblock_complete.json").write_bytes(bytes(range(256))),
    "the seal a list": lambda c: (c / "midblock_complete.json").write_text("[1]"),
}


@pytest.mark.parametrize("name", CHECKPOINT_FAULTS)
def test_a_damaged_checkpoint_gives_way_to_an_older_one(name: str, tiny_tokenizer: Any, tmp_path: Path) -> None:
    want, state = cut_run(tmp_path, tiny_tokenizer)
    CHECKPOINT_FAULTS[name](tmp_path / "checkpoint-8")
    losses, other, result = run(tiny_tokenizer, folder=tmp_path, save_steps=2, resume=True)
    assert result.resumed_from == 6
    assert any("checkpoint-8 was not used" in note for note in result.notes)
    assert losses == pytest.approx(want, rel=1e-6)
    assert all(torch.equal(other[n], state[n]) for n in state)


@pytest.mark.parametrize("content", [None, b"", bytes(range(256)), b"[]\n5\nnull\n", b'{"step": "x"}\n'])
def test_the_log_of_steps_is_made_from_the_checkpoint(content: bytes | None, tiny_tokenizer: Any, tmp_path: Path
                                                     ) -> None:
    want, state = cut_run(tmp_path, tiny_tokenizer)
    log = tmp_path / "steps.jsonl"
    log.unlink() if content is None else log.write_bytes(content)
    losses, other, result = run(tiny_tokenizer, folder=tmp_path, save_steps=2, resume=True)
    assert result.resumed_from == 8
    assert losses == pytest.approx(want, rel=1e-6)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, len(want) + 1))
    assert all(torch.equal(other[n], state[n]) for n in state)


def test_no_pickle_is_written_and_starting_anew_over_checkpoints_is_refused(tiny_tokenizer: Any, tmp_path: Path
                                                                           ) -> None:
    run(tiny_tokenizer, folder=tmp_path, save_steps=3)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert not {p.suffix for p in files} & {".bin", ".pt", ".pth", ".pkl"}
    assert not any(b"PK\x03\x04" in p.read_bytes()[:8] or p.read_bytes()[:1] == b"\x80" for p in files)
    assert json.loads((tmp_path / "checkpoint-9" / "training_args.json").read_text())["max_steps"] == 9
    with pytest.raises(OutputError, match="holds checkpoints"):
        run(tiny_tokenizer, folder=tmp_path)


def test_the_final_loss_is_of_the_last_tenth() -> None:
    steps = [StepLog(i + 1, 0, float(loss), 10, 5, 12, 0.5) for i, loss in enumerate([9] * 18 + [2, 4])]
    result = TrainResult(steps, 10.0, 1, {})
    assert result.final_loss() == 3.0
    assert result.describe()["first_loss"] == 9.0
    assert result.describe()["final_loss"] == 3.0
    assert result.tokens_per_second == 20.0
    assert result.describe()["padding_share"] == pytest.approx(1 - 10 / 12)
    late = TrainResult(steps, 10.0, 1, {}, resumed_from=19)
    assert late.tokens_per_second == 20.0
