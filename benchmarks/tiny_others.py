"""Tiny configurations of the models of images or sound and text, whole.

Made as those of text alone are (`tiny_families`), with their towers made small too, however deep
they lie, and with what has to fit between tower and text. What `NOT_OF_TEXT` names cannot be made
or trained on text here; the reason stands with it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import reduce
from typing import Any

from benchmarks.tiny_families import BUILT, NOT_ALONE, _shrink, tiny_config

TOWERS: dict[str, Any] = {
    "depth": 2, "out_hidden_size": 64, "text_hidden_size": 64, "output_dim": 64, "num_blocks": 2,
    "encoder_layers": 2, "codebook_size": 32, "embed_dim": 64, "image_embed_dim": 64,
    "qformer_hidden_size": 64, "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [1], "hidden_sizes": [64, 64], "num_position_embeddings": 64,
}  # fmt: skip
"""What a tower calls its sizes."""

SECTIONED = ("glm46v", "glm4v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl",
             "qwen2_5_omni_thinker", "qwen2_5_vl", "qwen2_vl")  # fmt: skip
"""Families whose rotation has sections that their configuration does not name."""

FITTING: dict[str, dict[str, Any]] = {
    "chameleon": {"vocabulary_map": {"<image>": 1}},
    "cohere_compass": {
        "text_config.layer_types": ["full_attention", "sliding_attention"] * 2,
        "text_config.rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "fun_asr_nano": {"adaptor_config.intermediate_size": 16},
    "emu3": {"vocabulary_map": {"<image>": 1}},
    "glm5_next": {"text_config.index_topk": 16, "text_config.qk_rope_head_dim": 0},
    "inkling2": {"text_config.unpadded_vocab_size": 64},
    "inkling2_loop": {"text_config.unpadded_vocab_size": 64},
    "hunyuan_vl": {"text_config.rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2, 2]}},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]}},
    "mistral_large4": {"text_config.kv_source_layers": [0, 1, 2, 3]},
    "molmo2": {"adapter_config.vision_feature_layer": [3, 2]},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 1, "audio_start_token_id": 1},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 1},
    "vibevoice_asr": {"acoustic_tokenizer_encoder_config.num_filters": 2,
                      "semantic_tokenizer_encoder_config.num_filters": 2},
}  # fmt: skip
"""What is set in a configuration after that."""

IMAGE = "takes no text without an image"
NOT_OF_TEXT = {
    **{key: reason for key, reason in NOT_ALONE.items() if key not in ("emu3", "mllama", "git")},
    **dict.fromkeys(
        ("blip", "blip-2", "git", "idefics", "instructblip", "instructblipvideo", "kosmos-2",
         "pix2struct", "pp_formulanet", "vision-encoder-decoder"), IMAGE),
    "apertus1p5": "has more tokens of images and sound than a tiny vocabulary can",
    "deepseek_ocr2": "has a tower whose sizes no tiny configuration here fits",
    "diffusion_gemma": "makes text by diffusion, and not token by token",
    "evolla": "sees proteins, and is in no Auto class of its own",
    "fast_vlm": "needs the package timm",
    "inkling_mm_model": "needs the package scipy",
    "perception_lm": "needs the package timm",
    "granite4_vision": "stock transformers does not load what it has saved",
    "kyutai_speech_to_text": "has a tower whose sizes no tiny configuration here fits",
    "mistral4": "has a rotation whose sizes no tiny configuration here fits",
    "minimax_m3_vl": "stock transformers does not load what it has saved",
    "nemo_speechlm": "has a tower whose sizes no tiny configuration here fits",
    "step3p7": "stock transformers does not load what it has saved",
    "muse_spark": "has a tower whose sizes no tiny configuration here fits",
    "qwen2_5_omni": "speaks too: it has no loss over text, as its thinker has",
    "qwen3_omni_moe": "speaks too: it has no loss over text, as its thinker has",
    "pi0": "makes movements, and no text",
    "shieldgemma2": "tells classes apart, and makes no text",
    "voxtral_realtime": "takes no text without sound",
}  # fmt: skip
"""What cannot be made or trained on text by itself, and why."""


def tiny_whole(family: str) -> Any:
    """The configuration of a tiny model of a family, with all of its parts."""
    config = tiny_config(family)
    for part in _parts(config):
        if part is not config and family not in BUILT:
            _shrink(part)
        if "vision" in type(part).__name__.lower() or "audio" in type(part).__name__.lower():
            for key, value in TOWERS.items():
                if hasattr(part, key):
                    with suppress(Exception):
                        setattr(part, key, value)
        _fit_rotation(part, family in SECTIONED)
    for path, value in FITTING.get(family, {}).items():
        *parts, key = path.split(".")
        setattr(reduce(getattr, parts, config), key, value)
    return config


def _parts(config: Any) -> Iterator[Any]:
    """A configuration and all that are in it."""
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if hasattr(part, "to_dict"):
            yield from _parts(part)


def _fit_rotation(part: Any, sectioned: bool) -> None:
    """Sections of a rotation by time, height and width that fit the tiny heads."""
    rope = getattr(part, "rope_parameters", None)
    if not isinstance(rope, dict) or not (sectioned or rope.get("mrope_section")):
        return
    width = getattr(part, "head_dim", None) or part.hidden_size // part.num_attention_heads
    half = int(width * rope.get("partial_rotary_factor", 1.0)) // 2
    third = half // 3
    part.rope_parameters = {**rope, "mrope_section": [half - 2 * third, third, third]}
