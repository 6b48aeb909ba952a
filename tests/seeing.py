"""Tiny models that see, made on disk with their processors, and rows with pictures for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from tiny import make_tokenizer

from leanlift.plan.auto import auto_class

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
    named = dict(zip(("image_token", "boi_token", "eoi_token"), tokens, strict=False))
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


def _qwen3_5() -> tuple[Any, Any]:
    """One of those that are loaded without the part that sees, for rows of text."""
    tokenizer = tokenizer_with("<image>", "<boi>", "<eoi>", "<video>")
    numbers = tokenizer.convert_tokens_to_ids(["<image>", "<boi>", "<eoi>", "<video>"])
    config = transformers.Qwen3_5Config(
        text_config={
            **TEXT, "vocab_size": len(tokenizer), "linear_num_key_heads": 2, "head_dim": 32,
            "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4,
                                "partial_rotary_factor": 0.25, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 2, "hidden_size": 64, "intermediate_size": 64, "num_heads": 4,
                       "patch_size": PATCH, "out_hidden_size": 64, "num_position_embeddings": 16},
        **dict(zip(("image_token_id", "vision_start_token_id", "vision_end_token_id",
                    "video_token_id"), numbers, strict=True)),
    )  # fmt: skip
    return config, tokenizer  # its processor needs torchvision


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
    "qwen3_5": _qwen3_5,
}


def make_seeing(path: Path, kind: str) -> Path:
    """A checkpoint with a language model of two blocks and a tower of two, and its processor."""
    torch.manual_seed(0)
    config, processor = SEEING[kind]()
    model = auto_class(config, kind, images=True).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 255, (SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def rows_with_pictures(directory: Path, count: int = 4) -> Path:
    """Chats about a picture, as JSON lines beside the pictures."""
    directory.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        picture(number).save(directory / f"{number}.png")
        chat = [
            {"role": "user", "content": f"what is {number}?"},
            {"role": "assistant", "content": f"a picture of {number}"},
        ]
        rows.append({"images": [f"{number}.png"], "messages": chat})
    file = directory / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file
