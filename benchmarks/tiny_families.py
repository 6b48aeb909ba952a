"""Tiny configurations of every causal language model that transformers registers.

Sizes go by many names; `SMALL` has them, and what a configuration has of these is set. Where one
is made of others as it is built, or has to fit them, the family is in `BUILT` (what its class is
called with) or in `FITTING` (what is set afterwards). What `NOT_ALONE` names cannot be made here,
or is no model of text by itself; the reason stands with it.
"""

from __future__ import annotations

from contextlib import suppress
from functools import reduce
from typing import Any

VOCABULARY, LENGTH = 64, 24
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "d_model": 64, "n_embd": 64, "n_embed": 64,
    "intermediate_size": 128, "ffn_dim": 128, "d_ff": 128, "n_inner": 128, "ffn_hidden_size": 128,
    "mlp_dim": 128, "expert_ffn_hidden_size": 64, "decoder_ffn_dim": 128, "encoder_ffn_dim": 128,
    "num_hidden_layers": 4, "n_layer": 4, "n_layers": 4, "num_layers": 4, "decoder_layers": 2,
    "encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "decoder_attention_heads": 4, "encoder_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "global_head_dim": 16, "max_position_embeddings": 128, "n_positions": 128,
    "max_seq_len": 128, "max_sequence_length": 128, "seq_length": 128, "n_ctx": 128,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
    "moe_shared_expert_intermediate_size": 64, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "moe_topk": 2,
    "moe_k": 2, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "sliding_window": 16, "rotary_dim": 8, "state_size": 8, "ssm_state_size": 16,
    "mamba_d_state": 16, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_num_heads": 8,
    "mamba_head_dim": 16, "mamba_n_groups": 1, "n_groups": 1, "mamba_chunk_size": 8,
    "chunk_size": 8, "mamba_d_ssm": 128, "mamba_dt_rank": 8, "time_step_rank": 8, "num_heads": 4,
    "lru_width": 64, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "embedding_size": 64, "embed_dim": 64,
    "input_embedding_size": 64, "rnn_hidden_size": 64, "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16, "laurel_rank": 8, "pad_token_id": 0, "bos_token_id": None,
    "eos_token_id": 1, "attention_hidden_size": 64, "index_n_heads": 2, "index_head_dim": 16,
    "index_topk": 8, "adapter_rank": 8, "expert_hidden_size": 64,
    "dense_attention_every_n_layers": 2,
    "attention_window_size": 16, "axial_pos_shape": [4, 6], "axial_pos_embds_dim": [32, 32],
    "num_buckets": 4, "attention_head_size": 16, "conv_L_cache": 3, "max_source_positions": 32,
    "max_target_positions": 128, "num_mel_bins": 16, "word_embed_proj_dim": 64,
    "logits_scaling": 8.0, "lm_head_multiplier": 0.5,
    "dim_ff": 128, "dff": 128, "linear_num_heads": 4, "linear_head_dim": 16, "shape_vocab_size": 64,
    "pronunciation_vocab_size": 64, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2,
    "swa_head_dim": 16, "zero_expert_num": 2,
}  # fmt: skip
"""Whatever a configuration may call its sizes."""

SLIDING = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2}
GEMMA4 = {**SLIDING, "global_head_dim": 32}
INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16,
           "indexer_budget": 8, "indexer_compress_ratio": 4}  # fmt: skip
QWEN4 = {"num_hidden_layers": 4, "hc_count": 2, "hc_lowrank": 8, "ngram_vocab_size_base": 64,
         "split_ngram_parts": 4, "ple_embed_dim": 64, **INDEXER}  # fmt: skip
DOTS3 = {"num_hidden_layers": 4, "layer_types": ["indexed_attention", "sliding_attention"] * 2,
         "num_key_value_heads": 4, "per_layer_config": {}}  # fmt: skip

BUILT: dict[str, dict[str, Any]] = {
    "dory": {"n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2,
             "num_hidden_layers": 6, "head_dim": 16,
             "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp",
                             "sliding_attention", "mlp"]},
    "dots3_note": {"text_config": DOTS3}, "dots3_note_text": DOTS3,
    "gemma3n_text": {**SLIDING, "num_kv_shared_layers": 2, "intermediate_size": [128] * 4,
                     "activation_sparsity_pattern": [0.0] * 4},
    "gemma4": {"text_config": GEMMA4}, "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4}, "gemma4_unified_text": GEMMA4,
    "gpt_neo": {"attention_types": [[["global", "local"], 2]], "num_layers": 4},
    "laguna": {"layer_types": ["full_attention", "sliding_attention"] * 2},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "longcat_flash": {"head_dim": 8, "num_key_value_heads": 4, "num_layers": 2},
    "qwen4_exp": {"text_config": QWEN4}, "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "attn_layers": ["local", "lsh"] * 2, "feed_forward_size": 128,
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8},
    "xlnet": {"d_head": 16, "d_inner": 128},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}  # fmt: skip
"""What the class of a configuration is called with beside what it has of `SMALL`."""

FITTING: dict[str, dict[str, Any]] = {
    "blt": {"encoder_hash_byte_group_vocab": 64, "global_config.hidden_size": 128,
            "global_config.head_dim": 32},
    "dbrx": {"attn_config.rope_theta": 1e4, "attn_config.clip_qkv": 8.0},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling2_loop_text": {"unpadded_vocab_size": VOCABULARY},
    "cohere_compass_text": {
        "layer_types": ["full_attention", "sliding_attention"] * 2,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "marian": {"decoder_vocab_size": VOCABULARY},
    "xlstm": {"embedding_dim": 64, "num_blocks": 4},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4},
    "zamba2": {
        "attention_hidden_size": 128, "attention_head_dim": 32, "num_key_value_heads": 4,
        "mamba_headdim": 16, "hybrid_layer_ids": [1, 3],
    },
}  # fmt: skip
"""What is set in a configuration after that."""

NOT_ALONE = {
    "blt": "has four parts, whose sizes no tiny configuration here fits",
    "dots3_note": "has parts for sound and pictures, whose sizes no tiny configuration here fits",
    "gemma3n": "needs the package timm",
    "gemma4_assistant": "drafts tokens for another model, whose hidden states it takes",
    "gemma4_unified_assistant": "drafts tokens for another model, whose hidden states it takes",
    "git": "has a loss of its own only where there is an image",
    "emu3": "stock transformers loads the saved text model under no AutoModelForCausalLM",
    "mllama": "stock transformers loads the saved text model under no AutoModelForCausalLM",
    "musicgen": "makes sound: its tokens are codes of several books",
    "musicgen_melody": "makes sound: its tokens are codes of several books",
}
"""What cannot be made or trained on text by itself, and why."""


def tiny_config(family: str) -> Any:
    """The configuration of a tiny model of a family."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[family]
    if family in BUILT:
        return _built(kind, BUILT[family])
    config = kind()
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        _shrink(part)
    for path, value in FITTING.get(family, {}).items():
        *parts, key = path.split(".")
        setattr(reduce(getattr, parts, config), key, value)
    return config


def _built(kind: Any, given: dict[str, Any]) -> Any:
    """A configuration from its fields, and the parts that it has from theirs."""
    parts = getattr(kind, "sub_configs", {})
    known = {key: value for key, value in SMALL.items() if key in kind.default_config_fields()}
    nested = {key: _built(parts[key], value) for key, value in given.items() if key in parts}
    config = kind(**{**known, **given, **nested})
    for name in parts:
        if name not in nested:
            _shrink(getattr(config, name))
    return config


def _shrink(part: Any) -> None:
    """Set what a configuration has of the sizes; None: a part that is not there."""
    if part is None:
        return
    known = {key: value for key, value in SMALL.items() if hasattr(part, key)}
    with suppress(Exception):  # one head of keys for each of queries stays that
        if part.num_key_value_heads == part.num_attention_heads:
            known["num_key_value_heads"] = SMALL["num_attention_heads"]
    known |= dict.fromkeys((key for key in vars(part) if _is_dropout(key, part)), 0.0)
    for key, value in known.items():
        with suppress(Exception):  # a field that follows from others
            setattr(part, key, value)
    for key, value in list(vars(part).items()):
        too_large = isinstance(value, int) and value >= VOCABULARY
        if key.endswith("_token_id") and (too_large or isinstance(value, list)):
            setattr(part, key, 1)
    if hasattr(part, "qk_rope_head_dim") and hasattr(part, "head_dim"):
        part.head_dim = part.qk_rope_head_dim  # what the rotation of these goes by
    layers = getattr(part, "num_hidden_layers", 4)
    for key in ("layer_types", "layers_block_type", "block_types", "mlp_layer_types"):
        found = getattr(part, key, None)
        if isinstance(found, list) and found and isinstance(layers, int):
            with suppress(Exception):
                setattr(part, key, _all_kinds(found, layers))


def _is_dropout(key: str, part: Any) -> bool:
    """Whether it is a share of what is dropped in training: oracles have none."""
    named = any(word in key for word in ("dropout", "pdrop", "layerdrop", "jitter"))
    return named and isinstance(getattr(part, key, None), float)


def _all_kinds(layers: list[str], count: int) -> list[str]:
    """A few layers that have every kind among them."""
    kinds = list(dict.fromkeys(layers))
    return [kinds[i % len(kinds)] for i in range(count)]
