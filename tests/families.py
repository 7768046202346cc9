"""Tiny, seeded, random models of many families, built from configs: no network, no files.

Every builder takes ``seed`` and config overrides and returns a model in eval mode with
hidden size 32, 4 blocks and 128 token ids unless overridden. Weights are drawn larger than
the families' own initialisation, and norms and biases are perturbed, so that a forgotten
norm, bias, scale or soft cap shows in the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel

VOCAB = 128
HIDDEN = 32
BLOCKS = 4
PAD, BOS, EOS, UNK = 0, 1, 2, 3

_IDS = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA_LIKE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.15, **_IDS,
}


def _finish(build: Callable[[], PreTrainedModel], seed: int) -> PreTrainedModel:
    """Build under a seed without touching the caller's random state; perturb 1-D parameters."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _causal(config_class: Any, model_class: Any, defaults: dict[str, Any]) -> Callable[..., PreTrainedModel]:
    def build(seed: int = 0, **overrides: Any) -> PreTrainedModel:
        config = config_class(**{**defaults, **overrides})
        return _finish(lambda: model_class(config), seed)

    return build


_GEMMA3_TEXT: dict[str, Any] = {
    **_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
    "layer_types": ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"],
}


def gemma3_nested(seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """Gemma-3 with a text tower of 4 blocks beside a vision tower of 4 (equal on purpose)."""
    text = {**_GEMMA3_TEXT, **overrides}
    config = tf.Gemma3Config(
        text_config=tf.Gemma3TextConfig(**text),
        vision_config={
            "model_type": "siglip_vision_model", "hidden_size": HIDDEN, "intermediate_size": 48,
            "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 16, "patch_size": 4,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4, boi_token_index=124, eoi_token_index=125, image_token_index=126,
    )
    return _finish(lambda: tf.Gemma3ForConditionalGeneration(config), seed)


FAMILIES: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": _causal(tf.LlamaConfig, tf.LlamaForCausalLM, _LLAMA_LIKE),
    "llama_tied": _causal(tf.LlamaConfig, tf.LlamaForCausalLM, {**_LLAMA_LIKE, "tie_word_embeddings": True}),
    "qwen2": _causal(tf.Qwen2Config, tf.Qwen2ForCausalLM, _LLAMA_LIKE),
    "qwen3": _causal(tf.Qwen3Config, tf.Qwen3ForCausalLM, {**_LLAMA_LIKE, "head_dim": 8}),
    "gemma2": _causal(tf.Gemma2Config, tf.Gemma2ForCausalLM, {
        **_LLAMA_LIKE, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8,
        "final_logit_softcapping": 5.0, "attn_implementation": "eager"}),
    "gemma3": _causal(tf.Gemma3TextConfig, tf.Gemma3ForCausalLM, _GEMMA3_TEXT),
    "gemma3_nested": gemma3_nested,
    "olmo2": _causal(tf.Olmo2Config, tf.Olmo2ForCausalLM, _LLAMA_LIKE),
    "mistral": _causal(tf.MistralConfig, tf.MistralForCausalLM, {**_LLAMA_LIKE, "sliding_window": None}),
    "phi3": _causal(tf.Phi3Config, tf.Phi3ForCausalLM, _LLAMA_LIKE),
    "gpt2": _causal(tf.GPT2Config, tf.GPT2LMHeadModel, {
        "vocab_size": VOCAB, "n_embd": HIDDEN, "n_layer": BLOCKS, "n_head": 4, "n_positions": 256,
        "initializer_range": 0.15, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0, **_IDS}),
    "gpt_neox": _causal(tf.GPTNeoXConfig, tf.GPTNeoXForCausalLM, {
        **{k: v for k, v in _LLAMA_LIKE.items() if k != "num_key_value_heads"}, "rotary_pct": 0.5}),
    "mixtral": _causal(tf.MixtralConfig, tf.MixtralForCausalLM, {
        **_LLAMA_LIKE, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    "qwen3_moe": _causal(tf.Qwen3MoeConfig, tf.Qwen3MoeForCausalLM, {
        **_LLAMA_LIKE, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32, "decoder_sparse_step": 1}),
    "granite": _causal(tf.GraniteConfig, tf.GraniteForCausalLM, {
        **_LLAMA_LIKE, "logits_scaling": 3.0, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
        "attention_multiplier": 0.3}),
    "cohere": _causal(tf.CohereConfig, tf.CohereForCausalLM, {**_LLAMA_LIKE, "logit_scale": 0.25}),
    "opt": _causal(tf.OPTConfig, tf.OPTForCausalLM, {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "ffn_dim": 64, "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": HIDDEN,
        "dropout": 0.0, "init_std": 0.15, **_IDS}),
    "t5": _causal(tf.T5Config, tf.T5ForConditionalGeneration, {
        "vocab_size": VOCAB, "d_model": HIDDEN, "d_kv": 8, "d_ff": 64, "num_layers": 3,
        "num_decoder_layers": BLOCKS, "num_heads": 4, "dropout_rate": 0.0,
        "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD}),
    "bart": _causal(tf.BartConfig, tf.BartForConditionalGeneration, {
        "vocab_size": VOCAB, "d_model": HIDDEN, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS,
        "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "max_position_embeddings": 256, "dropout": 0.0, "init_std": 0.15,
        "decoder_start_token_id": EOS, "forced_eos_token_id": None, **_IDS}),
}
"""Family name -> builder(seed=0, **config overrides)."""

DECODER_ONLY: tuple[str, ...] = tuple(name for name in FAMILIES if name not in ("t5", "bart"))
"""The families without an encoder."""


def token_ids(batch: int = 2, length: int = 12, *, seed: int = 0, vocab: int = VOCAB - 8) -> torch.Tensor:
    """Seeded token ids (batch, length) without special tokens, below ``vocab``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab, (batch, length), generator=generator)
