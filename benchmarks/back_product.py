"""The gradient of a layer's input on a CPU, as `layers.back_product` multiplies and as torch does.

    python -m benchmarks.back_product

grad_y [128, m] times W [m, n] in 16 bits, one thread, in turn in one process; CPU seconds, the
least of three. Beside them the product in fp32, of widened tensors. Where a CPU has products in 16
bits (`own products`), both ways are torch's.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from benchmarks.common import write_rows
from leanlift.layers.back_product import has_products, times_weight

SHAPES = ((2048, 2048), (5632, 2048))
TOKENS, REPEATS = 128, 3


def least(way: Callable[[Tensor, Tensor], Tensor], grad_y: Tensor, weight: Tensor) -> float:
    """CPU seconds."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        way(grad_y, weight)
        found.append(time.process_time() - started)
    return min(found)


def widened(grad_y: Tensor, weight: Tensor) -> Tensor:
    return (grad_y.float() @ weight.float()).to(grad_y.dtype)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for m, n in SHAPES:
        for dtype in (torch.bfloat16, torch.float16):
            pair = torch.randn(TOKENS, m).to(dtype), torch.randn(m, n).to(dtype)
            ours = least(partial(times_weight, on_cpu=True), *pair)
            plain, wide = least(torch.matmul, *pair), least(widened, *pair)
            rows.append(
                {
                    "dtype": str(dtype).removeprefix("torch."),
                    "m": m,
                    "n": n,
                    "tokens": TOKENS,
                    "own products": has_products(dtype),
                    "as here, s": round(ours, 4),
                    "grad_y @ W, s": round(plain, 4),
                    "widened, s": round(wide, 4),
                    "ratio": round(plain / ours, 1),
                }
            )
            print(rows[-1], flush=True)
    print(f"Wrote {write_rows('back_product', rows)}")


if __name__ == "__main__":
    main()
