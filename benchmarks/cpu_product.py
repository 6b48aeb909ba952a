"""A layer's two products over NF4 on a CPU, as they are made here and with a whole weight.

    python -m benchmarks.cpu_product

y = x W^T and grad_y W for 128 tokens, 5 % offsets, one thread, in turn in one process; CPU seconds,
the least of three. `whole` makes the effective weight and multiplies as torch does; in 16 bits, on
a CPU that has no such products (`own products`), that is by loops. `peak` are the bytes of tensors
that are made beside what is there, the result's too.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.common import write_rows
from benchmarks.peers import lift, llama, nf4_llama
from leanlift import LiftConfig
from leanlift.layers import LiftLinear
from leanlift.layers.cpu_product import has_products
from leanlift.measure import LiveBytes

PARTS = ("q_proj", "gate_proj", "down_proj")
TOKENS, WIDTH, REPEATS = 128, 2048, 3
Way = Callable[[LiftLinear, Tensor], Tensor]
WAYS: dict[str, tuple[Way, Way]] = {
    "x W^T": (
        lambda layer, x: layer.product(x),
        lambda layer, x: x @ layer.effective_weight(x.dtype).T,
    ),
    "grad_y W": (
        lambda layer, grad_y: layer.product_back(grad_y),
        lambda layer, grad_y: grad_y @ layer.effective_weight(grad_y.dtype),
    ),
}


def measured(way: Way, layer: LiftLinear, factor: Tensor) -> tuple[float, int]:
    """CPU seconds, and bytes of tensors at once."""
    found = []
    for _ in range(REPEATS):
        started = time.process_time()
        way(layer, factor)
        found.append(time.process_time() - started)
    with LiveBytes() as live:
        way(layer, factor)
    return min(found), live.peak


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = nf4_llama(llama(WIDTH, 1), torch.device("cpu"), dtype)
        lifted = lift(model, LiftConfig(density=0.05, selector="random"))
        layers = {n.split(".")[-1]: m for n, m in lifted.named_modules() if type(m) is LiftLinear}
        for part in PARTS:
            layer = layers[part]
            for name, (here, whole) in WAYS.items():
                width = layer.in_features if name == "x W^T" else layer.out_features
                factor = torch.randn(TOKENS, width).to(dtype)
                (ours, our_peak), (other, other_peak) = (
                    measured(way, layer, factor) for way in (here, whole)
                )
                rows.append(
                    {
                        "dtype": str(dtype).removeprefix("torch."),
                        "m": layer.out_features,
                        "n": layer.in_features,
                        "product": name,
                        "own products": has_products(dtype),
                        "here, s": round(ours, 4),
                        "whole, s": round(other, 4),
                        "here / whole": round(ours / other, 3),
                        "here, peak MiB": round(our_peak / 2**20, 1),
                        "whole, peak MiB": round(other_peak / 2**20, 1),
                    }
                )
                print(rows[-1], flush=True)
    print(f"Wrote {write_rows('cpu_product', rows)}")


if __name__ == "__main__":
    main()
