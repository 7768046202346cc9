"""A tiny pair for tests of studies, and the sizes of a small study."""

from __future__ import annotations

import json
from pathlib import Path

from conftest import build_tiny_tokenizer

SMALL = {"samples": 6, "token_samples": 3, "lens_samples": 3, "swap_samples": 3, "gradient_samples": 4,
         "max_length": 48, "segments": 2}


def tiny_pair(folder: Path) -> tuple[str, str, str]:
    """A base, a tuned model of five blocks, and twelve rows, written into a folder; their paths."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=5, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    model.save_pretrained(folder / "base")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder / "tuned")
    for name in ("base", "tuned"):
        build_tiny_tokenizer().save_pretrained(folder / name)
    rows = folder / "rows.jsonl"
    lines = [{"prompt": f"what is {i} and {i * i}? ", "completion": f"it is {i + i * i}, of course."}
             for i in range(12)]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(folder / "base"), str(folder / "tuned"), str(rows)
