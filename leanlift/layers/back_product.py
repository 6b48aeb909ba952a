"""The product of a backward pass, grad_y W, where a CPU has no products in 16 bits of its own.

Without AVX-512's or AMX's, torch multiplies in 16 bits by loops over the operands as they lie. One
of them goes along the sum of a product, and that of grad_y [T, m] with W [m, n], both row by row,
does not: it takes 14 to 56 times as long (`benchmarks/back_product`). So there grad_y is turned,
which is small beside W.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def times_weight(grad_y: Tensor, weight: Tensor, on_cpu: bool) -> Tensor:
    """grad_y W, [..., n], in rows.

    Args:
        grad_y: [..., m].
        weight: [m, n], in the same dtype.
        on_cpu: whether both are, or stand for tensors that are.
    """
    if not on_cpu or has_products(weight.dtype):
        return grad_y @ weight
    turned = grad_y.reshape(-1, grad_y.shape[-1]).t().contiguous()
    product = weight.t() @ turned
    del turned  # before the result is turned back
    return product.t().contiguous().view(*grad_y.shape[:-1], weight.shape[1])


@functools.cache
def has_products(dtype: torch.dtype) -> bool:
    """Whether this machine's CPU multiplies matrices in a dtype, by oneDNN or by BLAS."""
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return True
