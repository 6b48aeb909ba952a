"""Tiny models that see, made on disk with their processors, and rows with pictures for them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from towers import SEEING, SIDE

from leanlift.plan.auto import auto_class


def make_seeing(path: Path, kind: str, tower_width: int | None = None) -> Path:
    """A checkpoint with a language model of two blocks and a tower of two, and its processor.

    Args:
        path: where.
        kind: one of `SEEING`.
        tower_width: of the tower's MLPs.
    """
    torch.manual_seed(0)
    config, processor = SEEING[kind]()
    if tower_width is not None:
        config.vision_config.intermediate_size = tower_width
    model = auto_class(config, kind, images=True).from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return path


def picture(number: int) -> Image.Image:
    generator = torch.Generator().manual_seed(number)
    width = SIDE * (1 + number % 2)
    pixels = torch.randint(0, 255, (SIDE, width, 3), generator=generator, dtype=torch.uint8)
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
