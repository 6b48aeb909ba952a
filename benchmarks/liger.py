"""Liger's fused norms, rotary embedding and gated product in a Llama, for a while: as Liger puts
them into a model, and as leanlift's `fused_elementwise` does.

A part of `gpu_proof`. `liger-kernel` is optional: without it, or without a card, nothing of this
can run, and the proof says so.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from leanlift.layers.fused_elementwise import check_kernels
from leanlift.layers.fused_glu import use_fused_glu, use_stock_glu
from leanlift.layers.kept_norms import use_kept_norms
from leanlift.model import fused_elementwise

PATCHED = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
"""What Liger replaces in the module of transformers that has Llama's code."""


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Let a Llama, with whatever adapter is in it, compute what is between its products with
    Liger's kernels. The loss stays as it is. On the way out all is as before.

    Raises:
        ImportError: `liger-kernel` is not installed.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers import LlamaForCausalLM
    from transformers.models.llama import modeling_llama

    llama = next(module for module in model.modules() if isinstance(module, LlamaForCausalLM))
    stock = {name: getattr(modeling_llama, name) for name in PATCHED}
    kinds = (modeling_llama.LlamaRMSNorm, modeling_llama.LlamaMLP)
    before = {m: dict(vars(m)) for m in llama.modules() if isinstance(m, kinds)}
    try:
        apply_liger_kernel_to_llama(
            cross_entropy=False, fused_linear_cross_entropy=False, model=llama
        )
        yield
    finally:
        for name, value in stock.items():
            setattr(modeling_llama, name, value)
        for module, attributes in before.items():
            vars(module).clear()
            vars(module).update(attributes)


@contextmanager
def within(model: nn.Module) -> Iterator[None]:
    """Let a model with leanlift's adapter compute so by its own setting. On the way out as before.

    Raises:
        UserError: `liger-kernel` is not installed, or there is no card.
    """
    check_kernels(next(model.parameters()).is_cuda)
    fused_elementwise(model)
    try:
        yield
    finally:
        use_stock_glu(model)
        use_fused_glu(model)
        use_kept_norms(model)


def version() -> str:
    """Of the package, or "absent"."""
    metadata: Any = importlib.import_module("importlib.metadata")
    try:
        return str(metadata.version("liger-kernel"))
    except metadata.PackageNotFoundError:
        return "absent"
