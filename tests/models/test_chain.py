"""Pairs and chains: what fits together, names, and every refusal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import build_tiny_tokenizer
from families import token_ids
from midblock.errors import (
    MidblockError,
    PairMismatchError,
    SettingsError,
)
from midblock.models import (
    check_fit,
    choose_dtype,
    load_chain,
    load_model,
    load_pair,
)
from midblock.models.chain import resolve_stages, stage_names
from model_helpers import saved


def test_loaded_stages_of_different_formats_are_refused(tmp_path: Path) -> None:
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", dtype=torch.bfloat16)
    loaded = [load_model(base, device="cpu"), load_model(sft, dtype="bfloat16", device="cpu")]
    with pytest.raises(PairMismatchError, match=r"dtypes, float32 and bfloat16.*load_chain"):
        check_fit(loaded)
    # a folder beside a loaded model takes that one's
    assert [m.dtype for m in resolve_stages(loaded[1], str(base), None)] == [torch.bfloat16] * 2


@pytest.mark.parametrize(("stored", "asked", "gets"), [
    (("float32", "bfloat16"), "auto", torch.float32), (("bfloat16", "float32"), "auto", torch.float32),
    (("bfloat16", "float16"), "auto", torch.float32), (("bfloat16", "bfloat16"), "auto", None),
    (("float16", "float16"), "auto", None), (("bfloat16", "float16", "bfloat16"), "auto", torch.float32),
    (("float32", "bfloat16"), "bfloat16", torch.bfloat16)])
def test_stages_stored_in_different_formats_are_loaded_in_one_that_holds_all(
        tmp_path: Path, stored: tuple[str, ...], asked: str, gets: torch.dtype | None) -> None:
    gets = gets or choose_dtype("auto", stored=torch.bfloat16, device=torch.device("cpu")).dtype
    specs = [str(saved(tmp_path / f"m{i}", dtype=getattr(torch, name))) for i, name in enumerate(stored)]
    chain = load_chain(specs, dtype=asked, device="cpu")
    assert {m.dtype for m in chain} == {gets}
    assert {p.dtype for m in chain for p in m.model.parameters()} == {gets}
    if gets is torch.float32:  # exactly what is stored
        for loaded, spec in zip(chain, specs, strict=True):
            want = load_file(Path(spec) / "model.safetensors")
            own = dict(loaded.model.named_parameters())
            assert all(torch.equal(own[name], value.float()) for name, value in want.items())


def test_pair_and_chain(tmp_path: Path) -> None:
    base, sft, dpo = (saved(tmp_path / n, seed=i) for i, n in enumerate(("base", "tuned", "dpo")))
    first, second = load_pair(base, sft, device="cpu")
    assert (first.name, second.name) == ("base", "sft")
    assert first.fingerprint != second.fingerprint
    chain = load_chain([str(base), str(sft), str(dpo)], device="cpu")
    assert [m.name for m in chain] == ["base", "sft", "dpo"] == stage_names(3)
    named = load_chain([str(base), str(sft)], names=["a", "b"], device="cpu")
    assert [m.name for m in named] == ["a", "b"]


def test_same_checkpoint_twice_gives_two_models(tmp_path: Path) -> None:
    base = saved(tmp_path / "base")
    first, second = load_pair(base, base, device="cpu")
    assert first.model is not second.model
    assert first.fingerprint == second.fingerprint


@pytest.mark.parametrize(("overrides", "says"), [
    ({"num_hidden_layers": 3}, "depth 4 against 3"),
    ({"hidden_size": 16}, "width 32 against 16"),
    ({"num_key_value_heads": 4}, "key-value heads 2 against 4"),
    ({"intermediate_size": 96}, "MLP width 64 against 96")])
def test_sizes_that_differ_are_named(tmp_path: Path, overrides: dict[str, int], says: str) -> None:
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", **overrides)
    with pytest.raises(PairMismatchError, match=says):
        load_pair(base, sft, device="cpu")


def test_other_architecture_is_named(tmp_path: Path) -> None:
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", "qwen2")
    with pytest.raises(PairMismatchError, match="architecture 'llama' against 'qwen2'"):
        load_pair(base, sft, device="cpu")


def test_weights_only_one_side_has(tmp_path: Path) -> None:
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", mlp_bias=True)
    with pytest.raises(PairMismatchError, match=r"mlp\.down_proj\.bias.*absent against \(32,\)"):
        load_pair(base, sft, device="cpu")


def test_tied_base_with_untied_sft_is_a_pair(tmp_path: Path) -> None:
    base, sft = saved(tmp_path / "base", "llama_tied"), saved(tmp_path / "sft")
    first, second = load_pair(base, sft, device="cpu")
    assert (first.anatomy.tied, second.anatomy.tied) == (True, False)


def test_tokenizers_that_differ(tmp_path: Path) -> None:
    other = build_tiny_tokenizer()
    other.add_tokens(["<extra>"], special_tokens=True)
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", tokenizer=other)
    with pytest.raises(PairMismatchError, match=r"1 entries.*'<extra>' \(absent against 112\).*--tokenizer base"):
        load_pair(base, sft, device="cpu")
    first, second = load_pair(base, sft, tokenizer="base", device="cpu")
    assert second.tokenizer is first.tokenizer


def test_equal_vocabularies_that_cut_text_differently(tmp_path: Path) -> None:
    from tokenizers import pre_tokenizers

    other = build_tiny_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split("t", "isolated")  # no "th" any more
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", tokenizer=other)
    with pytest.raises(PairMismatchError, match="vocabularies agree"):
        load_pair(base, sft, device="cpu")


@pytest.mark.parametrize("bad", [
    {"specs": []}, {"specs": ["a", "b"], "names": ["x"]}, {"specs": ["a", "b"], "names": ["x", "x"]},
    {"specs": ["a"], "tokenizer": "other"}])
def test_bad_chain_settings(bad: dict) -> None:
    with pytest.raises(SettingsError):
        load_chain(**bad)


def test_every_refusal_is_one_line_and_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(MidblockError) as caught:
        load_model(tmp_path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("rows", [(128, 130), (130, 128), (128, 136, 120), (120, 128)])
@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma2"])
def test_vocabularies_of_different_size_are_compared_over_their_common_rows(
        tmp_path: Path, caplog: pytest.LogCaptureFixture, rows: tuple[int, ...], family: str) -> None:
    specs = [str(saved(tmp_path / f"m{i}", family, seed=i, vocab_size=n)) for i, n in enumerate(rows)]
    chain = load_chain(specs, device="cpu")
    common = min(rows)
    ids = token_ids() % 100
    for stage, spec, own in zip(chain, specs, rows, strict=True):
        assert stage.anatomy.vocab_size == common
        alone = load_model(spec, device="cpu")
        with torch.no_grad():
            assert torch.equal(stage.model(ids).logits, alone.model(ids).logits[..., :common])
        said = f"first {common} of the {own} rows"
        assert any(said in note for note in stage.notes) == (own > common)
        assert any(said in message for message in caplog.messages) == (own > common)


def test_tokens_that_only_the_larger_vocabulary_has(tmp_path: Path) -> None:
    other = build_tiny_tokenizer()
    other.add_tokens([f"<{i}>" for i in range(20)], special_tokens=True)  # ids 112 to 131
    base, sft = saved(tmp_path / "base"), saved(tmp_path / "sft", tokenizer=other, vocab_size=132)
    for pair in ((base, sft), (sft, base)):
        chain = load_pair(*pair, device="cpu")
        assert all(max(stage.tokenizer.get_vocab().values()) < 128 for stage in chain)
    renamed = build_tiny_tokenizer()
    renamed.add_tokens(["<x>"], special_tokens=True)  # id 112 on both sides, for different tokens
    clash = saved(tmp_path / "clash", tokenizer=renamed, vocab_size=128)
    few = build_tiny_tokenizer()
    few.add_tokens(["<y>", "<x>"], special_tokens=True)
    with pytest.raises(PairMismatchError, match="different tokenizers"):
        load_pair(clash, saved(tmp_path / "few", tokenizer=few, vocab_size=136), device="cpu")


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_stage_names(count: int) -> None:
    found = stage_names(count)
    assert found == ["base", "sft", "dpo", "rlvr", "stage5", "stage6"][:count]
    assert stage_names(count, found) == found
