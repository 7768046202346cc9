"""A tiny GGUF file."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np


def write_gguf(path: Path, *, pre: str = "smollm", file_type: int | None = None) -> dict[str, np.ndarray]:
    """A tiny LLaMA as GGUF, written with the gguf package; returns the tensors as written."""
    d, ff, heads, vocab, layers = 32, 64, 4, 64, 2
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    if file_type is not None:
        writer.add_file_type(file_type)
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(vocab)
    tokens = ["<s>", "</s>", *[chr(c) for c in range(33, 93)], "\u0120", "\u0120A"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (vocab - 2))
    writer.add_token_merges(["\u0120 A"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    tensors = {"token_embd.weight": rng.normal(size=(vocab, d)), "output_norm.weight": rng.normal(size=d)}
    for i in range(layers):
        for name, shape in (("attn_q", (d, d)), ("attn_k", (d, d)), ("attn_v", (d, d)),
                            ("attn_output", (d, d)), ("ffn_gate", (ff, d)), ("ffn_up", (ff, d)),
                            ("ffn_down", (d, ff)), ("attn_norm", (d,)), ("ffn_norm", (d,))):
            tensors[f"blk.{i}.{name}.weight"] = rng.normal(size=shape)
    tensors = {k: v.astype(np.float32) for k, v in tensors.items()}
    for name, value in tensors.items():
        if value.ndim == 2 and "embd" not in name:  # quantised, as files in the wild are
            kind = gguf.GGMLQuantizationType.Q8_0
            quantised = gguf.quantize(value, kind)
            writer.add_tensor(name, quantised, raw_dtype=kind)
            tensors[name] = gguf.dequantize(quantised, kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors
