"""An adapter to be lied about, in each of its forms."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint
from trained import logits

from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    refresh_mask,
    save_adapter,
)
from leanlift.adapters import FORMS, open_adapter, plan_peft, write_peft
from leanlift.model import lift_layers

NAME = "model.layers.0.self_attn.q_proj"
INDICES, WEIGHT = f"base_model.model.{NAME}.shira_indices", f"base_model.model.{NAME}.shira_weight"
WEIGHTS = "adapter_model.safetensors"
RETIRED = "settled"
"""What files call retired offsets."""


class Victim:
    """A base, live models over it, and an adapter in the form "own", in those of PEFT's
    ("peft", "super"), and in these as PEFT alone would have written them ("bare", "super bare")."""

    def __init__(self, work: Path) -> None:
        self.base = make_checkpoint(work / "base")
        self.stock = load(self.base, "dense").eval()
        self.attached = get_lift_model(
            copy.deepcopy(self.stock), LiftConfig(approx_rank=8), progress=False
        )
        for layer in lift_layers(self.attached).values():
            layer.values.data.normal_(std=0.05)
        refresh_mask(self.attached)
        save_adapter(self.attached, work / "own")
        for place, form in (("peft", "shira"), ("super", "super-tuning")):
            (work / place).mkdir()
            with open_adapter(work / "own") as adapter:
                plan = plan_peft(adapter, FORMS[form])
                write_peft(work / place, adapter, plan, lambda modules: modules)
        self.files = {
            form: {file.name: file.read_bytes() for file in (work / form).iterdir()}
            for form in ("own", "peft", "super")
        }
        for form, place in (("bare", "peft"), ("super bare", "super")):
            files = self.files[place]
            self.files[form] = {k: v for k, v in files.items() if k != "leanlift.json"}
        self.before = logits(self.stock), logits(self.attached)

    def put(self, form: str, directory: Path) -> Path:
        directory.mkdir()
        for name, data in self.files[form].items():
            (directory / name).write_bytes(data)
        return directory

    def refuses(self, adapter: Path, match: str) -> None:
        """On a stock model, on an attached one, which stay as they are, and in a merge."""
        for model, before in zip((self.stock, self.attached), self.before, strict=True):
            with pytest.raises(UserError, match=match):
                load_adapter(model, adapter)
            assert torch.equal(logits(model), before)
        assert not lift_layers(self.stock)
        merged = adapter.parent / "merged"
        with pytest.raises(UserError):
            merge_adapter(adapter, merged, base=self.base, progress=False)
        assert sorted(path.name for path in adapter.parent.iterdir()) == [adapter.name]


def edit_tensors(adapter: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace tensors, given by the end of their names with `__` for a dot, by functions of
    them; None takes a tensor out."""
    tensors = load_file(adapter / WEIGHTS)
    for end, change in changes.items():
        key = next(k for k in tensors if NAME in k and k.endswith(end.replace("__", ".")))
        new = change(tensors.pop(key).clone())
        if new is not None:
            tensors[key] = new.contiguous()
    save_file(tensors, adapter / WEIGHTS)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def at(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


def set_at(*path: Any) -> Callable[[Any], None]:
    """Set the value at the end of a path of keys."""

    def change(data: Any) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change
