"""What stands, under fake tensors, for kernels that there are none of and for moves to a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.streaming.offload import Nowhere, Offload


@contextmanager
def fused_attention() -> Iterator[None]:
    """Fake tensors have no device whose fused kernels could be asked for: torch would fall back to
    whole attention matrices, which neither a CPU nor a GPU makes."""

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if attn_mask is not None and attn_mask.requires_grad:  # which no fused kernel takes
            return stock(  # type: ignore[no-any-return]
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]

    functional: Any = torch.nn.functional
    stock = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def offloading(model: nn.Module, wanted: bool) -> Any:
    """What is kept for the backward pass leaves the device and comes back, as in a run, without a
    host that it goes to."""
    return Offload(model, Nowhere()) if wanted else nullcontext()
