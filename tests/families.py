"""Tiny, seeded, random models of many families, built from configs: no network, no files.

Every builder takes ``seed`` and config overrides and returns a model in eval mode with
hidden size 32, 4 blocks and 128 token ids unless overridden. Weights are drawn larger than
the families' own initialisation, and norms and biases are perturbed, so that a forgotten
norm, bias, scale or soft cap shows in the logits.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

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


# ---------------------------------------------------------------------------------------------
# every causal family of the installed transformers, made tiny by the names of its config's fields


def _sizes(groups: dict[Any, str]) -> dict[str, Any]:
    return {name: value for value, names in groups.items() for name in names.split()}


_SIZES: dict[str, Any] = {
    **_sizes({
        VOCAB: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size",
        HIDDEN: "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim attention_hidden_size lru_width "
                "embedding_dim input_embedding_size output_embedding_size moe_intermediate_size "
                "shared_expert_intermediate_size shared_intermediate_size moe_shared_expert_intermediate_size "
                "expert_ffn_hidden_size shared_experts_intermediate_size",
        BLOCKS: "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks "
                "num_attention_heads n_head n_heads decoder_attention_heads encoder_attention_heads "
                "num_decoder_attention_heads num_encoder_attention_heads attention_heads num_heads linear_num_heads "
                "swa_num_attention_heads num_experts n_routed_experts num_local_experts moe_num_experts rotary_dim "
                "qk_rope_head_dim linear_num_value_heads",
        2: "encoder_layers num_encoder_layers num_key_value_heads num_kv_heads swa_num_key_value_heads "
           "num_experts_per_tok moe_topk moe_k top_k_experts linear_num_key_heads",
        64: "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner dff dim_ff d_inner feed_forward_size "
            "ffn_hidden_size intermediate_size_mlp prefix_dense_intermediate_size dense_intermediate_size",
        1: "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group mamba_n_groups n_groups "
           "mamba_ngroups",
        8: "head_dim v_head_dim qk_nope_head_dim kv_channels dim_head attention_head_size d_head d_kv swa_head_dim "
           "index_head_dim attention_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
           "query_pre_attn_scalar sliding_window sliding_window_size window_size attention_window_size "
           "attention_chunk_size local_attention mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim "
           "mamba_chunk_size chunk_size mamba_n_heads mamba_num_heads n_mamba_heads index_topk "
           "hidden_size_per_layer_input",
        # many heads, so that a sparse attention finds no two tokens of equal score
        16: "q_lora_rank kv_lora_rank o_lora_rank index_n_heads",
        256: "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions "
             "max_source_positions original_max_position_embeddings",
        0.15: "initializer_range init_std",
        0.0: "attention_dropout hidden_dropout_prob attention_probs_dropout_prob dropout activation_dropout "
             "resid_pdrop decoder_layerdrop encoder_layerdrop embd_pdrop hidden_dropout attn_pdrop layerdrop "
             "dropout_p emb_pdrop "
             "embed_dropout resid_dropout embedding_dropout mlp_dropout residual_dropout summary_first_dropout "
             "lsh_attention_probs_dropout_prob local_attention_probs_dropout_prob router_jitter_noise "
             "input_jitter_noise"}),
    **_IDS}
# fields whose default None means "derived from the others", and which are set all the same
_ALWAYS = {"num_key_value_heads", "head_dim", "n_inner", "max_position_embeddings", *_IDS}
_DECODER = {"is_decoder": True}
_MLA = {"num_key_value_heads": 4}
_FULL_SLIDING = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
_LINEAR_FULL = ["linear_attention", "full_attention", "linear_attention", "full_attention"]
_SPECIAL: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie",
                     "megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roformer", "xlm-roberta",
                     "xlm-roberta-xl"), _DECODER),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa",
                     "minicpm3", "youtu"), _MLA),
    "bailing_hybrid": {"head_dim": 8},
    "bamba": {"attn_layer_indices": [1, 3]},
    "big_bird": {**_DECODER, "attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "cohere_compass_text": {"layer_types": _FULL_SLIDING, "rope_parameters": {
        "full_attention": None, "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0,
                                                      "mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "attn_pdrop": 0.0, "clip_qkv": 8.0},
             "ffn_config": {"ffn_hidden_size": 32, "hidden_size": HIDDEN, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {**_MLA, "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {"layer_types": _FULL_SLIDING, "num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.0] * 4,
                     "laurel_rank": 4},
    "gemma4_text": {"layer_types": _FULL_SLIDING, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {"layer_types": _FULL_SLIDING, "num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 4, "qk_head_dim": 12, "zero_expert_num": 2, "num_layers": 2,
                      "num_key_value_heads": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mpt": {"attn_config": {"attn_pdrop": 0}},
    "qwen3_5_text": {"layer_types": _LINEAR_FULL},
    "qwen3_5_moe_text": {"layer_types": _LINEAR_FULL},
    "qwen3_next": {"layer_types": _LINEAR_FULL},
    "qwen4_exp_text": {"indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2, "layer_types": ["linear_attention", "indexed_attention"] * 2,
                       "hc_lowrank": 8, "hc_count": 2, "ngram_vocab_size_base": 16},
    "dots3_note_text": {**_MLA, "first_k_dense_replace": 1, **{f"{k}{n}": v for k in ("", "swa_") for n, v in (
        ("q_lora_rank", 16), ("kv_lora_rank", 16), ("qk_nope_head_dim", 8), ("v_head_dim", 8),
        ("qk_rope_head_dim", 4), ("head_dim", 12), ("num_attention_heads", 4), ("num_key_value_heads", 4))}},
    "reformer": {**_DECODER, "attn_layers": ["local", "lsh", "local", "lsh"], "axial_pos_shape": [16, 16],
                 "axial_pos_embds_dim": [16, 16], "num_buckets": 4, "hash_seed": 0},
    "roc_bert": {**_DECODER, "pronunciation_vocab_size": 16, "shape_vocab_size": 16, "pronunciation_embed_dim": 16,
                 "shape_embed_dim": 16},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {**_DECODER, "default_language": "en_XX"},
    "zamba": {"layers_block_type": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2, "attention_head_dim": 16},
    "zamba2": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4,
               "attention_head_dim": 16, "mamba_headdim": 8},
    "zaya": {"num_experts_per_tok": 1},
}
NOT_BUILT = {
    "llama4": "its text model is llama4_text",
    **{name: f"its text model is {name}_text" for name in (
        "dots3_note", "gemma3", "gemma4", "gemma4_unified", "qwen3_5", "qwen3_5_moe", "qwen4_exp")},
    "blt": "bytes in patches of an entropy model, no token rows",
    "cpmant": "its forward wants prompt segments of its own",
    "fuyu": "pictures in the text's place; the text model is Persimmon",
    "gemma4_assistant": "drafts for another model from its hidden states",
    "gemma4_unified_assistant": "drafts for another model from its hidden states",
    "got_ocr2": "its encoder of pictures has sizes of its own; the text model is Qwen2",
    "moss_transcribe_diarize": "its encoder of sound has sizes of its own; the text model is Qwen3",
    "phi4_multimodal": "its encoders of pictures and sound have sizes of their own; the text model is Phi-3",
    "emu3": "codes of pictures; its text model is Llama-like",
    "gemma3n": "needs timm; its text model is gemma3n_text",
    "git": "needs pictures",
    "musicgen": "codes of sound in several streams",
    "musicgen_melody": "codes of sound in several streams",
    "moshi": "codes of sound in several streams",
}
"""Model types that have no tiny text model here, and why."""


def config_of(config_class: Any, changes: dict[str, Any]) -> Any:
    """A config of any causal family with every size that it names made tiny."""
    fields = {f.name: f.default for f in dataclasses.fields(config_class)}
    changes = dict(changes)
    values: dict[str, Any] = {}
    for name, default in fields.items():
        nested = getattr(config_class, "sub_configs", {}).get(name)
        if name in _SIZES and (default is not None or name in _ALWAYS):
            values[name] = _SIZES[name]
        elif name == "text_config" and dataclasses.is_dataclass(nested):
            values[name] = config_of(nested, changes.pop(name, {})).to_dict()
    return config_class(**{**values, **changes})


def causal_types() -> list[str]:
    """Model types of transformers' `AutoModelForCausalLM`."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny(model_type: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A tiny model of any of `causal_types`, or of `FAMILIES`.

    Raises:
        ValueError: it is too large all the same, or not built for a reason (`NOT_BUILT`).
    """
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return FAMILIES[model_type.removesuffix("_seq2seq")](seed=seed, **overrides)
    if model_type in NOT_BUILT:
        raise ValueError(NOT_BUILT[model_type])
    made = config_of(CONFIG_MAPPING[model_type], {**_SPECIAL.get(model_type, {}), **overrides})
    model_class = getattr(tf, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    with torch.device("meta"):
        size = sum(p.numel() for p in model_class(made).parameters())
    if size > 3_000_000:
        raise ValueError(f"{size:,} parameters: some size is not named as elsewhere")
    return _finish(lambda: model_class(made), seed)


def token_ids(batch: int = 2, length: int = 12, *, seed: int = 0, vocab: int = VOCAB - 8) -> torch.Tensor:
    """Seeded token ids (batch, length) without special tokens, below ``vocab``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, vocab, (batch, length), generator=generator)
