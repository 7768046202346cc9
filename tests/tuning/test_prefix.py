"""FrozenPrefix changes no loss and no gradient, whatever the family, the padding and the trainer."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from families import BLOCKS, DECODER_ONLY, FAMILIES, PAD, token_ids
from midblock.errors import CacheRefusedError, SettingsError
from midblock.models import find_anatomy
from midblock.models.attention import dense_attention
from midblock.tuning import FrozenPrefix, PrefixCache, lora_config
from midblock.tuning.kernels import supervised_loss
from midblock.tuning.prefix_identity import first_trainable_block, prefix_identity

# what PEFT and TRL themselves say of these tiny models
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def adapted(family: str, mask: str = "0010", **overrides: Any) -> PeftModel:
    """A tiny model with LoRA whose B is not zero, so that every A gets a gradient."""
    model = FAMILIES[family](**overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        peft_model = get_peft_model(model, lora_config(model, mask=mask, rank=4))
        for name, parameter in peft_model.named_parameters():
            if parameter.requires_grad and "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
    return peft_model


def batch(lengths: tuple[int, ...], side: str, *, seed: int = 0, width: int | None = None) -> dict[str, Tensor]:
    width = width or max(lengths)
    ids = torch.full((len(lengths), width), PAD)
    mask = torch.zeros_like(ids)
    rows = token_ids(len(lengths), max(lengths), seed=seed)
    for i, n in enumerate(lengths):
        span = slice(0, n) if side == "right" else slice(width - n, width)
        ids[i, span] = rows[i, :n]
        mask[i, span] = 1
    labels = torch.where(mask.bool(), ids, -100)
    labels[:, : width // 3] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def losses_and_grads(model: nn.Module, batches: list[dict[str, Tensor]], epochs: int = 1
                     ) -> tuple[list[float], list[dict[str, Tensor]]]:
    losses, grads = [], []
    for _ in range(epochs):
        for inputs in batches:
            model.zero_grad(set_to_none=True)
            loss = model(**inputs).loss
            loss.backward()
            losses.append(loss.item())
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return losses, grads


def assert_same(got: tuple[list[float], list[dict[str, Tensor]]],
                want: tuple[list[float], list[dict[str, Tensor]]]) -> None:
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    for mine, theirs in zip(got[1], want[1], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine
        for name in theirs:
            scale = theirs[name].abs().max().item() + 1e-12
            assert (mine[name] - theirs[name]).abs().max().item() <= 1e-5 * scale, name


BATCHES = [((9, 12), 0), ((7, 5), 1)]


@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("family", DECODER_ONLY)
def test_losses_and_gradients_are_those_without_it(family: str, cache: str) -> None:
    model = adapted(family)
    model.train()
    batches = [batch(lengths, "right", seed=seed) for lengths, seed in BATCHES]
    for inputs in batches:
        if family == "gemma3_nested":  # its forward asks for this in training
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
    want = losses_and_grads(model, batches, epochs=2)
    with FrozenPrefix(model, cache=cache) as prefix:
        got = losses_and_grads(model, batches, epochs=2)
    assert prefix.start == 2
    assert_same(got, want)
    if cache == "memory":
        assert (prefix.rows_computed, prefix.rows_cached) == (4, 4)
    assert_same(losses_and_grads(model, batches), (want[0][:2], want[1][:2]))  # all restored


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_encoder_decoders_run_without_grad_and_refuse_the_cache(family: str) -> None:
    model = adapted(family)
    model.train()
    inputs = batch((9, 12), "right")
    want = losses_and_grads(model, [inputs])
    with FrozenPrefix(model):
        assert_same(losses_and_grads(model, [inputs]), want)
    with FrozenPrefix(model, cache="memory"), pytest.raises(CacheRefusedError, match="encoder"):
        model(**inputs)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "opt"])
def test_left_padding(family: str) -> None:
    model = adapted(family)
    model.train()
    batches = [batch(lengths, "left", seed=seed) for lengths, seed in BATCHES]
    want = losses_and_grads(model, batches, epochs=2)
    with FrozenPrefix(model, cache="memory") as prefix:
        assert_same(losses_and_grads(model, batches, epochs=2), want)
    assert prefix.rows_cached == 4


def test_the_same_row_hits_under_another_padding_and_misses_at_another_offset() -> None:
    model = adapted("llama")
    model.train()
    short = batch((6,), "right", seed=3)
    wide = batch((6,), "right", seed=3, width=11)
    left = batch((6,), "left", seed=3, width=11)
    want = losses_and_grads(model, [wide])
    with FrozenPrefix(model, cache="memory") as prefix:
        model(**short)
        assert_same(losses_and_grads(model, [wide]), want)
        assert (prefix.rows_computed, prefix.rows_cached) == (1, 1)
        model(**left)
        assert (prefix.rows_computed, prefix.rows_cached) == (2, 1)


def test_partial_hits_compute_only_the_missing_rows() -> None:
    model = adapted("qwen3")
    model.train()
    both = batch((9, 12), "right")
    one = {k: v[:1] for k, v in both.items()}
    want = losses_and_grads(model, [both])
    seen: list[int] = []
    anatomy = find_anatomy(model)
    with FrozenPrefix(model, cache="memory") as prefix:
        model(**one)
        handle = anatomy.blocks[0].register_forward_hook(lambda m, a, o: seen.append(a[0].shape[0]))
        assert_same(losses_and_grads(model, [both]), want)
        handle.remove()
    assert (prefix.rows_computed, prefix.rows_cached) == (2, 1)
    # hooks of a replaced block still fire: once with the missing row, once passed over with both
    assert seen == [1, 2]


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("cache", ["none", "memory"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_gradient_checkpointing_with_input_grads(family: str, cache: str, reentrant: bool) -> None:
    model = adapted(family)
    model.train()
    batches = [batch(lengths, "right", seed=seed) for lengths, seed in BATCHES]
    want = losses_and_grads(model, batches, epochs=2)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    blocks = find_anatomy(model).blocks
    runs: list[int] = []
    handles = [b.self_attn.register_forward_hook(lambda m, a, o, i=i: runs.append(i)) if hasattr(b, "self_attn")
               else b.attn.register_forward_hook(lambda m, a, o, i=i: runs.append(i))
               for i, b in enumerate(blocks)]
    with FrozenPrefix(model, cache=cache):
        first = losses_and_grads(model, batches)
        runs.clear()
        second = losses_and_grads(model, batches)
    for handle in handles:
        handle.remove()
    assert_same((first[0] + second[0], first[1] + second[1]), want)
    # each trained block runs forward and again in the backward pass; frozen ones never a second time
    assert runs.count(3) == runs.count(2) == 4
    assert runs.count(0) == runs.count(1) == (2 if cache == "none" else 0)
    assert all(b.gradient_checkpointing for b in blocks if hasattr(b, "gradient_checkpointing"))


def test_nothing_of_the_prefix_is_kept_for_the_backward_pass() -> None:
    model = adapted("llama", mask="0001")
    model.train()
    outputs: list[weakref.ref[Tensor]] = []
    grads: list[bool] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        outputs.append(weakref.ref(hidden))
        grads.append(hidden.requires_grad)

    anatomy = find_anatomy(model)
    handles = [b.mlp.register_forward_hook(watch) for b in anatomy.blocks[:3]]
    model.enable_input_require_grads()
    with FrozenPrefix(model):
        loss = model(**batch((9, 12), "right")).loss
        gc.collect()
        assert len(outputs) == 3
        assert not any(grads)
        assert all(ref() is None for ref in outputs)
        loss.backward()
    for handle in handles:
        handle.remove()


def test_a_cached_epoch_runs_no_block_of_the_prefix() -> None:
    model = adapted("llama", mask="0010")
    model.train()
    inputs = batch((9, 12), "right")
    runs: list[int] = []
    handles = [b.mlp.register_forward_hook(lambda m, a, o, i=i: runs.append(i))
               for i, b in enumerate(find_anatomy(model).blocks)]
    with FrozenPrefix(model, cache="memory"):
        model(**inputs)
        runs.clear()
        model(**inputs)
    for handle in handles:
        handle.remove()
    assert runs == [2, 3]


def test_full_rank_updates_and_a_trained_head() -> None:
    model = FAMILIES["llama"]()
    model.train().requires_grad_(False)
    model.model.layers[3].mlp.requires_grad_(True)
    model.lm_head.requires_grad_(True)
    inputs = [batch((9, 12), "right")]
    want = losses_and_grads(model, inputs)
    with FrozenPrefix(model, cache="memory") as prefix:
        assert_same(losses_and_grads(model, inputs), want)
        assert prefix.start == 3
    model.model.layers.requires_grad_(False)
    want = losses_and_grads(model, inputs)
    with FrozenPrefix(model, cache="memory") as prefix:
        assert_same(losses_and_grads(model, inputs), want)
        assert prefix.start == BLOCKS


def test_the_first_block_is_found_anew_at_every_forward() -> None:
    model = adapted("llama", mask="1111")
    model.train()
    inputs = [batch((9, 12), "right")]
    with FrozenPrefix(model, cache="memory") as prefix:
        model(**inputs[0])
        assert prefix.start == 0
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora" in name and ".layers.3." in name)
        want_grads = losses_and_grads(model, inputs)
        assert prefix.start == 3
    assert_same(want_grads, losses_and_grads(model, inputs))


def test_forwards_without_grad_are_left_alone() -> None:
    model = adapted("llama")
    inputs = batch((9, 12), "right")
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True).hidden_states
        generated = model.generate(input_ids=inputs["input_ids"][:, :5], max_new_tokens=4, do_sample=False)
        with FrozenPrefix(model, cache="memory") as prefix:
            got = model(**inputs, output_hidden_states=True).hidden_states
            assert torch.equal(generated, model.generate(input_ids=inputs["input_ids"][:, :5], max_new_tokens=4,
                                                         do_sample=False))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert prefix.start is None


def test_evaluation_and_reference_passes_read_what_training_kept() -> None:
    model = adapted("llama")
    model.train()
    inputs = batch((9, 12), "right")
    runs: list[int] = []
    with torch.no_grad():
        want = model.eval()(**inputs).loss
        with model.disable_adapter():
            reference = model(**inputs).loss
    model.train()
    handles = [b.mlp.register_forward_hook(lambda m, a, o, i=i: runs.append(i))
               for i, b in enumerate(find_anatomy(model).blocks)]
    with FrozenPrefix(model, cache="memory") as prefix:
        model(**inputs).loss.backward()
        runs.clear()
        model.eval()
        with torch.no_grad():
            assert model(**inputs).loss.item() == pytest.approx(want.item(), rel=1e-6)
            with model.disable_adapter():
                assert model(**inputs).loss.item() == pytest.approx(reference.item(), rel=1e-6)
            assert runs == [2, 3, 2, 3]
            other = batch((5, 8), "right", seed=4)  # rows that training has not seen
            got = model(**other).loss
        model.train()
        model(**other).loss.backward()
        assert prefix.rows_computed == 4
        with torch.inference_mode():
            model.eval()
            assert model(**other).loss.item() == pytest.approx(got.item(), rel=1e-6)
        # nothing is missing where keys and values are asked for
        with torch.no_grad():
            assert model(input_ids=inputs["input_ids"], use_cache=True).past_key_values is not None
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        assert model(**other).loss.item() == pytest.approx(got.item(), rel=1e-6)


def test_a_loss_on_padding_is_exact_too() -> None:
    model = adapted("llama")
    model.train()
    inputs = batch((9, 12), "right")
    inputs["labels"] = inputs["input_ids"].clone()  # a loop that forgot to mask its labels
    want = losses_and_grads(model, [inputs])
    with FrozenPrefix(model, cache="memory") as prefix:
        assert_same(losses_and_grads(model, [inputs]), want)
    assert prefix.rows_bypassed == 2


# ---------------------------------------------------------------------------------------------
# refusals


def assert_refused(model: nn.Module, inputs: dict[str, Any], match: str) -> None:
    with FrozenPrefix(model, cache="memory"), pytest.raises(CacheRefusedError, match=match):
        model(**inputs)


def test_dropout_in_the_prefix_is_refused() -> None:
    model = adapted("llama", attention_dropout=0.1)
    inputs = batch((9, 12), "right")
    model.train()
    assert_refused(model, inputs, "attention_dropout=0.1")
    with FrozenPrefix(model):  # without a cache a random prefix is fine
        model(**inputs).loss.backward()
    assert any(p.grad is not None for p in model.parameters())
    model.eval()  # and so is a cache when dropout is off
    want = model(**inputs).logits
    with FrozenPrefix(model, cache="memory") as prefix:
        got = model(**inputs).logits
    real = inputs["attention_mask"].bool()  # padding is left out of the blocks
    torch.testing.assert_close(got[real], want[real], rtol=1e-4, atol=1e-5)
    assert prefix.rows_computed == len(inputs["input_ids"])


def test_noise_that_no_attribute_tells_of_is_found() -> None:
    model = adapted("llama")
    model.train()
    block = find_anatomy(model).blocks[0]
    handle = block.register_forward_hook(lambda m, a, o: o + 0.01 * torch.randn_like(o) if m.training else o)
    assert_refused(model, batch((9, 12), "right"), "not deterministic")
    handle.remove()
    with FrozenPrefix(model, cache="memory") as prefix:  # it was the hook
        model(**batch((9, 12), "right"))
    assert prefix.rows_computed == 2


def supervised(family: str, cache: str | PrefixCache, order: list[tuple[dict[str, Tensor], bool]], mask: str = "0010"
               ) -> tuple[Any, FrozenPrefix]:
    """Losses and gradients of batches, each packed or padded, in midblock's own loss."""
    model = adapted(family, mask)
    model.train()
    anatomy = find_anatomy(model)
    losses, grads = [], []
    with dense_attention(model), FrozenPrefix(model, cache=cache) as prefix:
        for inputs, packed in order:
            model.zero_grad(set_to_none=True)
            loss = supervised_loss(anatomy, inputs, plain=True, packed=packed)
            loss.backward()
            losses.append(loss.item())
            grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    return (losses, grads), prefix


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_packed_rows_are_cached_row_by_row(family: str) -> None:
    """Rows cached in one company, padded or packed, serve in another."""
    first, second = batch((4, 2, 3), "right"), batch((4, 3, 2, 4), "right", seed=1)
    mixed = {k: torch.cat([second[k][:2], F.pad(first[k][:1], (0, second[k].shape[1] - first[k].shape[1])),
                           second[k][2:]]) for k in first}
    want, _ = supervised(family, "none", [(x, False) for x in (first, second, mixed)])
    got, prefix = supervised(family, "memory", [(first, True), (second, False), (mixed, True)])
    assert_same(got, want)
    assert (prefix.rows_computed, prefix.rows_cached, prefix.rows_bypassed) == (7, 5, 0)
    got, prefix = supervised(family, "memory", [(first, True), (mixed, True), (second, True)])
    assert_same(got, ([want[0][i] for i in (0, 2, 1)], [want[1][i] for i in (0, 2, 1)]))
    assert (prefix.rows_computed, prefix.rows_cached) == (7, 5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "qwen3_moe"])
def test_a_later_prefix_goes_on_from_an_earlier_one(family: str, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, extra = (batch((4, 2, 3), "right"), packed), (batch((3, 4), "right", seed=1), packed)
    want, _ = supervised(family, "none", [inputs, extra], "0001")
    cache = PrefixCache()
    supervised(family, cache, [inputs], "0100")
    original = FrozenPrefix._compute
    ran: list[int] = []

    def watched(self: FrozenPrefix, forward: Any, call: Any, start: int, origin: int = 0, *rest: Any) -> Tensor:
        ran.append(start - origin)
        return original(self, forward, call, start, origin, *rest)

    monkeypatch.setattr(FrozenPrefix, "_compute", watched)
    got, prefix = supervised(family, cache, [inputs, extra], "0001")
    assert_same(got, want)
    assert (prefix.rows_extended, prefix.rows_computed) == (3, 5)
    assert ran == [3, 3, 2, 3]  # one row twice to look for noise; then blocks 1 and 2 of the known rows; all three


def test_packed_rows_are_refused() -> None:
    model = adapted("llama")
    model.train()
    ids = token_ids(1, 10)
    assert_refused(model, {"input_ids": ids, "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])}, "packing")
    assert_refused(model, {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1]])}, "gap")


def test_router_logits_are_refused() -> None:
    model = adapted("mixtral")
    model.train()
    assert_refused(model, {**batch((9, 12), "right"), "output_router_logits": True}, "router_aux_loss_coef")


def test_trained_embeddings_are_refused() -> None:
    model = adapted("llama")
    model.get_input_embeddings().weight.requires_grad_(True)
    model.train()
    with FrozenPrefix(model), pytest.raises(CacheRefusedError, match="embed_tokens"):
        model(**batch((9, 12), "right"))
    tied = FAMILIES["llama_tied"]()
    tied.requires_grad_(False)
    tied.lm_head.weight.requires_grad_(True)
    with pytest.raises(CacheRefusedError, match="shares its weight"):
        first_trainable_block(find_anatomy(tied))


def test_two_on_one_model_are_refused_and_errors_restore_it() -> None:
    model = adapted("llama")
    with FrozenPrefix(model), pytest.raises(SettingsError, match="another FrozenPrefix"), FrozenPrefix(model):
        pass
    before = dict(model.base_model.model.model.__dict__)
    with pytest.raises(ZeroDivisionError), FrozenPrefix(model, cache="memory"):
        raise ZeroDivisionError
    assert model.base_model.model.model.__dict__.keys() == before.keys()
    assert all("forward" not in b.__dict__ for b in find_anatomy(model).blocks)


# ---------------------------------------------------------------------------------------------
# never stale


def test_changed_weights_are_another_identity() -> None:
    model = adapted("llama")
    model.train()
    inputs = batch((9, 12), "right")
    cache = PrefixCache()
    blocks = find_anatomy(model).blocks  # which runs a few tokens, and so before the cache is there
    with FrozenPrefix(model, cache=cache):
        model(**inputs)
        with torch.no_grad():
            blocks[0].mlp.up_proj.weight.mul_(1.5)
        got = losses_and_grads(model, [inputs])
    assert cache.hits == 0
    assert cache.misses == 4
    assert_same(got, losses_and_grads(model, [inputs]))


def test_identity_tells_what_a_prefix_depends_on() -> None:
    model = adapted("llama", mask="0011")
    anatomy = find_anatomy(model)
    one = prefix_identity(anatomy, 1)
    assert one == prefix_identity(anatomy, 1) != prefix_identity(anatomy, 2)
    with torch.no_grad():
        anatomy.blocks[2].mlp.up_proj.weight.add_(1.0)  # behind the prefix
        anatomy.head.weight.add_(1.0)
    assert prefix_identity(anatomy, 1) == one
    assert prefix_identity(anatomy, 1) == prefix_identity(find_anatomy(FAMILIES["llama"]()), 1)
    assert prefix_identity(find_anatomy(FAMILIES["llama"](seed=1)), 1) != one
    assert prefix_identity(find_anatomy(FAMILIES["llama"](rms_norm_eps=1e-3)), 1) != one
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefix_identity(anatomy, 1) != one


def test_a_disk_cache_serves_another_process_and_survives_broken_files(tmp_path: Path) -> None:
    inputs = batch((9, 12), "right")
    first = adapted("llama")
    first.train()
    with FrozenPrefix(first, cache=f"disk:{tmp_path}"):
        want = losses_and_grads(first, [inputs])
    files = sorted(tmp_path.glob("*/*.safetensors"))
    assert len(files) == 2
    second = adapted("llama")
    second.train()
    with FrozenPrefix(second, cache=f"disk:{tmp_path}") as prefix:
        assert_same(losses_and_grads(second, [inputs]), want)
    assert (prefix.rows_cached, prefix.rows_computed) == (2, 0)
    files[0].write_bytes(files[0].read_bytes()[:40])  # as a power cut may leave it
    with FrozenPrefix(second, cache=f"disk:{tmp_path}") as prefix:
        assert_same(losses_and_grads(second, [inputs]), want)
    assert (prefix.rows_cached, prefix.rows_computed) == (1, 1)


def test_adapters_of_other_arms_share_the_prefix() -> None:
    cache = PrefixCache()
    inputs = batch((9, 12), "right")
    model = FAMILIES["llama"]()
    for mask in ("0010", "0011"):
        arm = get_peft_model(model, lora_config(model, mask=mask, rank=2))
        arm.train()
        with FrozenPrefix(arm, cache=cache) as prefix:
            arm(**inputs).loss.backward()
        model = arm.unload()
    assert prefix.rows_cached == 2
    assert len(cache) == 2


# ---------------------------------------------------------------------------------------------
# under other people's trainers


def rows() -> list[dict[str, list[int]]]:
    made = []
    for i, n in enumerate((9, 12, 7, 10)):
        ids = token_ids(1, n, seed=i)[0].tolist()
        made.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
    return made


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trl_sft_trainer(checkpointing: bool, tmp_path: Path, tiny_tokenizer: Any) -> None:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    def run(cache: str | None) -> list[float]:
        model = FAMILIES["llama"]()
        trainer = SFTTrainer(
            model, train_dataset=Dataset.from_list(rows()), processing_class=tiny_tokenizer,
            peft_config=lora_config(model, mask="0010", rank=4),
            args=SFTConfig(output_dir=str(tmp_path / str(cache)), max_steps=6, per_device_train_batch_size=2,
                           logging_steps=1, save_strategy="no", report_to="none", bf16=False, use_cpu=True,
                           gradient_checkpointing=checkpointing, learning_rate=1e-2, disable_tqdm=True,
                           dataloader_pin_memory=False))
        if cache is None:
            trainer.train()
        else:
            with FrozenPrefix(trainer.model, cache=cache) as prefix:
                trainer.train()
            assert prefix.start == 2
            assert cache == "none" or prefix.rows_cached == 8
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    want = run(None)
    assert len(want) == 6
    assert want[-1] < want[0]
    assert run("none") == pytest.approx(want, rel=1e-6)
    assert run("memory") == pytest.approx(want, rel=1e-6)


def test_transformers_trainer(tmp_path: Path, tiny_tokenizer: Any) -> None:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    def run(cache: str | None) -> list[float]:
        trainer = Trainer(
            adapted("qwen2"), train_dataset=rows(), data_collator=DataCollatorForSeq2Seq(tiny_tokenizer),
            args=TrainingArguments(output_dir=str(tmp_path), max_steps=6, per_device_train_batch_size=2,
                                   logging_steps=1, save_strategy="no", report_to="none", use_cpu=True,
                                   learning_rate=1e-2, disable_tqdm=True, dataloader_pin_memory=False))
        if cache is None:
            trainer.train()
        else:
            with FrozenPrefix(trainer.model, cache=cache):
                trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    want = run(None)
    assert run("memory") == pytest.approx(want, rel=1e-6)


# ---------------------------------------------------------------------------------------------
# the cache itself


def test_the_limit_holds_and_other_namespaces_go_first() -> None:
    cache = PrefixCache(limit_bytes=4 * 40)
    row = torch.ones(2, 5)  # 40 bytes
    for i in range(3):
        cache.put("old", str(i), row * i)
    for i in range(6):
        cache.put("new", str(i), row * i)
    assert cache.bytes <= 160
    assert cache.get("old", "0") is None
    kept = [i for i in range(6) if cache.get("new", str(i)) is not None]
    assert kept == [0, 1, 2, 3]
    assert cache.refused_bytes == 80
    found = cache.get("new", "3")
    assert found is not None
    assert torch.equal(found, row * 3)


def test_the_limit_of_a_disk_cache_counts_what_is_there(tmp_path: Path) -> None:
    PrefixCache("disk", folder=tmp_path).put("a", "1", torch.ones(100, 10))
    again = PrefixCache("disk", folder=tmp_path, limit_bytes="5K")
    assert again.bytes >= 4000
    again.put("a", "2", torch.ones(100, 10))
    assert again.get("a", "2") is None
    assert again.get("a", "1") is not None
    again.clear()
    assert len(again) == 0
    assert again.bytes == 0


def test_a_limited_cache_is_still_exact() -> None:
    model = adapted("llama")
    model.train()
    batches = [batch(lengths, "right", seed=seed) for lengths, seed in BATCHES]
    want = losses_and_grads(model, batches, epochs=2)
    with FrozenPrefix(model, cache="memory", limit_bytes=2000) as prefix:
        assert_same(losses_and_grads(model, batches, epochs=2), want)
    assert 0 < prefix.rows_cached < 4


@pytest.mark.parametrize("spec", ["ram", "disk", "disk:"])
def test_unknown_caches(spec: str) -> None:
    with pytest.raises(SettingsError, match="none, memory, disk:DIR"):
        PrefixCache.from_spec(spec)


@pytest.mark.parametrize("size", ["0", "lots", "-1GB"])
def test_unknown_sizes(size: str) -> None:
    with pytest.raises(SettingsError, match="bytes"):
        PrefixCache(limit_bytes=size)


def test_partial_hits_of_a_model_that_makes_its_masks_outside_its_body() -> None:
    model = adapted("gemma3_nested")
    model.train()
    both = batch((9, 12), "right")
    both["token_type_ids"] = torch.zeros_like(both["input_ids"])
    want = losses_and_grads(model, [both])
    with FrozenPrefix(model, cache="memory") as prefix:
        model(**{k: v[1:] for k, v in both.items()})
        assert_same(losses_and_grads(model, [both]), want)
    assert (prefix.rows_computed, prefix.rows_cached) == (2, 1)
