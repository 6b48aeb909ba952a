"""What stands, under fake tensors, for kernels that there are none of and for moves to a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.streaming.offload import Nowhere, Offload


@contextmanager
def fused_attention(cuda: bool = False) -> Iterator[None]:
    """Fake tensors have no device whose fused kernels could be asked for: torch would fall back to
    whole attention matrices, which neither a CPU nor a GPU makes.

    Args:
        cuda: whether they stand for tensors on a GPU, whose backward kernels sum the queries'
            gradient up in fp32 where it is in 16 bits.
    """

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
        learned = attn_mask is not None and attn_mask.requires_grad
        if learned or (dropout_p and not cuda):  # which no fused kernel takes
            return stock(  # type: ignore[no-any-return]
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                enable_gqa=enable_gqa,
            )  # fmt: skip
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out = fused(query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale)[0]
        if cuda and query.dtype.itemsize == 2 and out.grad_fn is not None:
            _beside(out.grad_fn, query)
        return out

    functional: Any = torch.nn.functional
    stock = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock


def _beside(node: Any, query: Tensor) -> None:
    """Let there be, while a backward node runs, an fp32 tensor of the queries' shape [B, H, S, D],
    of whole tiles: S in steps of 128, D in steps of 32."""
    *rows, tokens, width = query.shape
    shape, device = (*rows, -(-tokens // 128) * 128, -(-width // 32) * 32), query.device
    held: list[Tensor] = []

    def take(*_: Any) -> None:
        held.append(torch.empty(shape, dtype=torch.float32, device=device))

    node.register_prehook(take)
    node.register_hook(lambda *_: held.clear())


def offloading(model: nn.Module, wanted: bool) -> Any:
    """What is kept for the backward pass leaves the device and comes back, as in a run, without a
    host that it goes to."""
    return Offload(model, Nowhere()) if wanted else nullcontext()
