"""Configurations and processors of tiny models that see, one of each kind."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import transformers
from tiny import make_tokenizer

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)

SIDE, PATCH = 16, 8
"""Pixels of a picture, and of the patches that it is cut into."""

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
    "tie_word_embeddings": False,
}
TOWER = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}


def tokenizer_with(*tokens: str) -> Any:
    """The tiny tokenizer with tokens for an image, its beginning and its end, as its configuration
    names them."""
    kinds = ("image_token", "boi_token", "eoi_token", "video_token")
    return _tokenizer(dict(zip(kinds, tokens, strict=False)))


def _tokenizer(named: dict[str, str]) -> Any:
    plain = make_tokenizer()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain._tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        extra_special_tokens=named,
    )  # fmt: skip


def _llava() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>")
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)}
    config = transformers.LlavaConfig(
        text_config=text,
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=tokenizer.image_token_id,
        vision_feature_layer=-1,
    )
    size = {"height": SIDE, "width": SIDE}
    images = transformers.CLIPImageProcessor(size=size, crop_size=size, do_center_crop=False)
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return config, processor


def _gemma3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>", "<boi>", "<eoi>")
    config = transformers.Gemma3Config(
        text_config={**TEXT, "vocab_size": len(tokenizer), "sliding_window": 32,
                     "layer_types": ["sliding_attention", "full_attention"]},
        vision_config=TOWER,
        image_token_index=tokenizer.image_token_id,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        mm_tokens_per_image=4,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    images = transformers.Gemma3ImageProcessor(size=size)
    processor = transformers.Gemma3Processor(
        images, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<boi>"), image_seq_length=4
    )
    return config, processor


def _qwen(family: str, text: dict[str, Any], vision: dict[str, Any]) -> tuple[Any, Any]:
    """As those whose images have as many patches as they have places for; the family's processor
    takes videos too, for which it needs torchvision."""
    tokenizer = tokenizer_with("<image>", "<boi>", "<eoi>", "<video>")
    names = ("image_token_id", "vision_start_token_id", "vision_end_token_id", "video_token_id")
    numbers = tokenizer.convert_tokens_to_ids(["<image>", "<boi>", "<eoi>", "<video>"])
    config = getattr(transformers, f"{family}Config")(
        text_config={**TEXT, "vocab_size": len(tokenizer), **text},
        vision_config={"depth": 2, "num_heads": 4, "patch_size": PATCH, **vision},
        **dict(zip(names, numbers, strict=True)), tie_word_embeddings=False,
    )  # fmt: skip
    if not has_processor("qwen3_vl"):
        return config, tokenizer
    size = {"shortest_edge": SIDE**2, "longest_edge": 16 * SIDE**2}
    kept: Any = {"patch_size": PATCH, "size": size}
    images = transformers.Qwen2VLImageProcessor(**kept)
    videos = getattr(transformers, VIDEOS.get(family, "Qwen3VLVideoProcessor"))(**kept)
    processor = getattr(transformers, PROCESSORS.get(family, f"{family}Processor"))(
        images, tokenizer, videos, chat_template=TEMPLATE.replace("IMAGE", "<boi><image><eoi>")
    )
    processor.image_token, processor.video_token = "<image>", "<video>"
    return config, processor


PROCESSORS = {"Qwen3_5": "Qwen3VLProcessor"}
VIDEOS = dict.fromkeys(("Qwen2VL", "Qwen2_5_VL"), "Qwen2VLVideoProcessor")


def _sections(*sections: int, **more: Any) -> dict[str, Any]:
    """A rotation by time, height and width."""
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections), **more}


def _qwen2_5_vl() -> tuple[Any, Any]:
    return _qwen(
        "Qwen2_5_VL", {"rope_parameters": _sections(4, 2, 2)},
        {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64, "window_size": 32,
         "fullatt_block_indexes": [1]},
    )  # fmt: skip


def _qwen2_vl() -> tuple[Any, Any]:
    return _qwen(
        "Qwen2VL", {"rope_parameters": _sections(4, 2, 2)},
        {"embed_dim": 64, "hidden_size": 64, "mlp_ratio": 1},
    )  # fmt: skip


def _qwen3_vl() -> tuple[Any, Any]:
    return _qwen(
        "Qwen3VL", {"rope_parameters": _sections(4, 2, 2, mrope_interleaved=True)},
        {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64,
         "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]},
    )  # fmt: skip


def _qwen3_5() -> tuple[Any, Any]:
    """One of those that are loaded without the part that sees, for rows of text."""
    return _qwen(
        "Qwen3_5",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "head_dim": 32,
         "layer_types": ["linear_attention", "full_attention"],
         "rope_parameters": _sections(2, 1, 1, partial_rotary_factor=0.25)},
        {"hidden_size": 64, "intermediate_size": 64, "out_hidden_size": 64,
         "num_position_embeddings": 16},
    )  # fmt: skip


def _internvl() -> tuple[Any, Any]:
    named = {"start_image_token": "<boi>", "end_image_token": "<eoi>",
             "context_image_token": "<image>", "video_token": "<video>"}  # fmt: skip
    tokenizer = _tokenizer(named)
    config = transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "model_type": "internvl_vision"},
        image_token_id=tokenizer.context_image_token_id, image_seq_length=1,
        tie_word_embeddings=False,
    )  # fmt: skip
    if not has_processor("internvl"):
        return config, tokenizer
    size = {"height": SIDE, "width": SIDE}
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, max_patches=4, crop_to_patches=True),
        tokenizer, transformers.InternVLVideoProcessor(size=size), image_seq_length=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>\n"),
    )  # fmt: skip
    return config, processor


def _mistral3() -> tuple[Any, Any]:
    tokenizer = _tokenizer({"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]",
                            "image_end_token": "[IMG_END]"})  # fmt: skip
    config = transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "model_type": "pixtral", "image_size": 4 * SIDE, "patch_size": 4},
        image_token_index=tokenizer.image_token_id, tie_word_embeddings=False,
    )  # fmt: skip
    if not has_processor("mistral3"):
        return config, tokenizer
    images = transformers.PixtralImageProcessor(size={"longest_edge": 4 * SIDE}, patch_size=4)
    processor = transformers.PixtralProcessor(
        images, tokenizer, patch_size=4, spatial_merge_size=2,
        chat_template=TEMPLATE.replace("IMAGE", "[IMG]"),
    )  # fmt: skip
    return config, processor


def _llava_next() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>")
    pins = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]
    config = transformers.LlavaNextConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "model_type": "clip_vision_model", "projection_dim": 64},
        image_token_index=tokenizer.image_token_id, vision_feature_layer=-1,
        image_grid_pinpoints=pins, tie_word_embeddings=False,
    )  # fmt: skip
    size = {"height": SIDE, "width": SIDE}
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=pins
    )
    processor = transformers.LlavaNextProcessor(
        images, tokenizer, patch_size=PATCH, vision_feature_select_strategy="default",
        num_additional_image_tokens=1, chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return config, processor


def _smolvlm() -> tuple[Any, Any]:
    named = {"image_token": "<image>", "fake_image_token": "<fake>",
             "global_image_token": "<global>", "end_of_utterance_token": "<end>"}  # fmt: skip
    tokenizer = _tokenizer(named)
    config = transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(tokenizer)},
        vision_config={**TOWER, "model_type": "smolvlm_vision"}, scale_factor=2,
        image_token_id=tokenizer.image_token_id,
    )  # fmt: skip
    if not has_processor("smolvlm"):
        return config, tokenizer
    size: Any = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**size), tokenizer,
        transformers.SmolVLMVideoProcessor(**size), image_seq_len=1,
        chat_template=TEMPLATE.replace("IMAGE", "<image>"),
    )  # fmt: skip
    return config, processor


def _paligemma() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>")
    tokenizer.bos_token = "<unk>"
    size = {"height": SIDE, "width": SIDE}
    images = transformers.SiglipImageProcessor(size=size)
    images.image_seq_length = (SIDE // PATCH) ** 2
    processor = transformers.PaliGemmaProcessor(
        images, tokenizer, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    config = transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": len(processor.tokenizer)},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "projection_dim": 64},
        image_token_index=processor.image_token_id, projection_dim=64,
    )  # fmt: skip
    return config, processor


def _idefics3() -> tuple[Any, Any]:
    tokenizer = tokenizer_with("<image>", "<fake_token_around_image>", "<end_of_utterance>")
    images = transformers.Idefics3ImageProcessor(
        size={"longest_edge": SIDE},
        max_image_size={"longest_edge": SIDE},
        do_image_splitting=False,
    )
    processor = transformers.Idefics3Processor(
        images, tokenizer, image_seq_len=1, chat_template=TEMPLATE.replace("IMAGE", "<image>")
    )
    config = transformers.Idefics3Config(
        text_config={**TEXT, "model_type": "llama", "vocab_size": len(processor.tokenizer)},
        vision_config=TOWER, image_token_id=processor.image_token_id, scale_factor=2,
    )  # fmt: skip
    return config, processor


SEEING = {
    "paligemma": _paligemma,
    "idefics3": _idefics3,
    "llava": _llava,
    "gemma3": _gemma3,
    "llava_next": _llava_next,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "qwen3_vl": _qwen3_vl,
    "qwen3_5": _qwen3_5,
    "internvl": _internvl,
    "mistral3": _mistral3,
    "smolvlm": _smolvlm,
}

NEEDED = dict.fromkeys(
    ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "mistral3"), ("torchvision",)
) | {"smolvlm": ("torchvision", "num2words")}
"""Packages that a kind's processor needs beside Pillow; without them it has but its tokenizer."""


def has_processor(kind: str) -> bool:
    """Whether a kind's processor can be made here."""
    return all(find_spec(package) for package in NEEDED.get(kind, ()))


WITH_PROCESSOR = [kind for kind in SEEING if kind != "paligemma" and has_processor(kind)]
"""Those whose processors can be made here, and TRL can ask for a completion alone."""
