"""What targets mean in models whose blocks differ: per block, exactly, with what is not reached told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model

from families import FAMILIES, token_ids
from midblock.errors import AdapterError, SettingsError
from midblock.tuning import (
    attach,
    check_engagement,
    export_adapter,
    frozen_digests,
    make_plan,
    merged_weights,
    require_gradients,
    with_weights,
)

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4,
                         "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.1,
                         "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FIVE = {**SIZES, "num_hidden_layers": 5}


def lfm2() -> Any:
    return tf.Lfm2ForCausalLM(tf.Lfm2Config(**FIVE, layer_types=["conv", "conv", "full_attention", "conv",
                                                                 "full_attention"]))


def bamba() -> Any:
    return tf.BambaForCausalLM(tf.BambaConfig(
        **FIVE, attn_layer_indices=[2, 4], mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
        mamba_chunk_size=8))


def gemma4() -> Any:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(
        **FIVE, head_dim=8, layer_types=kinds, sliding_window=8, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128, num_kv_shared_layers=2))


def mamba() -> Any:
    return tf.MambaForCausalLM(tf.MambaConfig(vocab_size=128, hidden_size=32, num_hidden_layers=4, state_size=8))


def gpt_oss() -> Any:
    return tf.GptOssForCausalLM(tf.GptOssConfig(
        **{**SIZES, "num_hidden_layers": 4, "intermediate_size": 32}, head_dim=8, num_local_experts=4,
        num_experts_per_tok=2, layer_types=["full_attention"] * 4))


def deepseek() -> Any:
    return tf.DeepseekV32ForCausalLM(tf.DeepseekV32Config(
        **{**SIZES, "num_key_value_heads": 4}, num_hidden_layers=4, moe_intermediate_size=16, q_lora_rank=16,
        kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1, index_n_heads=2, index_head_dim=16,
        index_topk=8))


def seeded(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def trained_by_hand(model: Any, plan: Any, tmp_path: Path | None = None) -> None:
    """Counts are PEFT's, every matrix is reached and moves, merged weights and a reloaded adapter compute the same."""
    ids = token_ids(2, 12)
    with attach(model, plan) as attachment:
        before = frozen_digests(attachment)
        require_gradients(attachment, ids, torch.ones_like(ids))
        generator = torch.Generator().manual_seed(0)
        for parameter in attachment.trainable.values():
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
        report = check_engagement(attachment, before, ids).require()
        assert {u.name for u in report.updates} == {m.name for m in plan.modules}
        with torch.no_grad():
            want = attachment.model(ids).logits
        weights = merged_weights(attachment)
        if tmp_path is not None:
            export_adapter(attachment, tmp_path / "adapter", base_name="base")
    with with_weights(model, weights), torch.no_grad():
        assert torch.allclose(model(ids).logits, want, atol=1e-3)
    if tmp_path is not None:
        with torch.no_grad():
            assert torch.allclose(PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(ids).logits, want,
                                  atol=1e-4)


def test_targets_drop_per_block_and_are_listed() -> None:
    model = seeded(lfm2)
    plan = make_plan(model, mask="11111", rank=2)
    assert plan.blocks == (2, 4)
    assert [(m.block, m.targets) for m in plan.missing] == [(b, ("q", "k", "v", "o")) for b in (0, 1, 3)]
    assert "not reached: blocks 0:2,3 have no q, k, v, o" in plan.summary()
    everything = make_plan(model, mask="11111", rank=2, target_modules=["all-linear"])
    assert everything.blocks == (0, 1, 2, 3, 4)
    linear = {n for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {m.name.removeprefix("model.layers.") for m in everything.modules} == linear
    trained_by_hand(model, everything)


def test_a_mask_without_any_target_says_where_there_are_some() -> None:
    with pytest.raises(SettingsError, match=r"blocks 0:2 have none of q, k, v, o; blocks 2,4 do.*conv\.in_proj"):
        make_plan(
            seeded(lfm2), blocks="0:2", rank=2)
    with pytest.raises(SettingsError, match=r"'Wqkv' of .* matches no linear layer"):
        make_plan(seeded(lfm2), mask="11111", rank=2, target_modules=["q", "Wqkv"])


def test_attention_beside_state_space_blocks() -> None:
    model = seeded(bamba)
    plan = make_plan(model, mask="11111", rank=2, target_modules=["all-linear"])
    assert plan.blocks == (0, 1, 2, 3, 4)
    made = get_peft_model(seeded(bamba), plan.lora_config(seeded(bamba)))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == plan.params


def test_blocks_that_share_keys_and_values_have_none_of_their_own() -> None:
    model = seeded(gemma4)
    plan = make_plan(model, mask="00001", rank=2)
    assert {m.name.rpartition(".")[2] for m in plan.modules} <= {"q_proj", "k_proj", "v_proj", "o_proj"}
    trained_by_hand(model, plan)


@pytest.mark.parametrize("targets", [["mlp"], ["q", "k", "v", "o"], ["out_proj"], ["nothing"]])
def test_a_mamba_model_has_no_such_matrices(targets: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"Found: .*in_proj|has: .*in_proj"):
        make_plan(seeded(mamba), mask="0110", rank=2, target_modules=targets)


def test_what_a_mamba_model_has_is_trained() -> None:
    model = seeded(mamba)
    plan = make_plan(model, mask="0110", rank=2, target_modules=["in_proj", "x_proj"])
    assert plan.blocks == (1, 2)
    trained_by_hand(model, plan)


@pytest.mark.parametrize("build", [FAMILIES["mixtral"], FAMILIES["qwen3_moe"], gpt_oss])
def test_fused_experts_are_planned_counted_trained_and_reloaded(build: Any, tmp_path: Path) -> None:
    model = seeded(build)
    plan = make_plan(model, mask="0110", rank=2, target_modules=["all-linear"])
    stacks = [m for m in plan.modules if m.experts]
    assert len(stacks) == 4  # two parameters in each of two blocks
    assert all(model.get_parameter(m.name).numel() == m.weights for m in stacks)
    made = get_peft_model(seeded(build), plan.lora_config(seeded(build)))
    assert sum(p.numel() for p in made.parameters() if p.requires_grad) == plan.params
    assert {m.name for m in make_plan(model, mask="0110", rank=2, target_modules=["experts"]).modules} == {
        m.name for m in stacks}
    trained_by_hand(model, plan, tmp_path)


def test_experts_take_no_dropout_and_no_dora() -> None:
    model = FAMILIES["mixtral"]()
    plan = make_plan(model, mask="0010", rank=2, target_modules=["experts"], method="dora")
    with pytest.raises(SettingsError, match="without dropout and DoRA"), attach(model, plan):
        pass


def test_full_rank_updates_of_experts_in_16_bit() -> None:
    model = FAMILIES["mixtral"]().bfloat16()
    plan = make_plan(model, mask="0010", method="full", target_modules=["experts"])
    with attach(model, plan) as attachment:
        ids = token_ids(2, 12)
        want = attachment.model(ids).logits
        assert torch.equal(want, FAMILIES["mixtral"]().bfloat16()(ids).logits)
        want.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in attachment.trainable.values())


def test_what_no_gradient_reaches_is_not_selected() -> None:
    model = seeded(deepseek)
    plan = make_plan(
        model, mask="1111", rank=2, target_modules=["all-linear"])
    assert not [m.name for m in plan.modules if "indexer" in m.name]
    with pytest.raises(SettingsError, match="no gradient reaches it"):
        make_plan(model, mask="1111", rank=2, target_modules=["indexer.wk"])


def test_a_matrix_outside_the_forward_is_told_before_training() -> None:
    model = FAMILIES["llama"]()
    model.model.layers[2].self_attn.k_extra = torch.nn.Linear(32, 32)
    plan = make_plan(model, mask="0010", rank=2, target_modules=["q", "k_extra"])
    ids = token_ids(2, 6)
    with attach(model, plan) as attachment, pytest.raises(AdapterError, match=r"2 of 4 .*no gradient.*k_extra"):
        require_gradients(attachment, ids, torch.ones_like(ids))


def test_names_are_lists_where_leaves_and_blocks_cannot_say_them(tmp_path: Path) -> None:
    model = FAMILIES["gpt2"](n_layer=12)
    plan = make_plan(model, mask="1", rank=2)
    config = plan.lora_config(model)
    assert not isinstance(config.target_modules, str)
    assert config.target_modules == {m.name for m in plan.modules}
    import json

    with attach(model, plan) as attachment:
        export_adapter(attachment, tmp_path / "adapter", base_name="base")
    stored = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert stored["target_modules"] == [m.name for m in plan.modules]
