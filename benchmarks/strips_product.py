"""The values' gradient by strips of sorted columns beside what is done today: a ratio in one run.

    python -m benchmarks.strips_product [--small]

On a GPU: the dense product and the gather (`ops=triton`) and the product by strips
(`ops=triton-strips`). On a CPU: the sampled product, the dense product and a gather, and the
product by strips in plain torch. At the shapes of Llama-2-7B's Linears with 2048 tokens (on a CPU
512) in bf16 (on a CPU that has no such products in fp32), on masks of 5 % and 1 % whose entries
crowd as in a trained matrix: the largest of |L R^T| with L and R of lognormal row sizes. How much
of a mask is formed depends on how it crowds, so the share stands beside each ratio;
`benchmarks.mask_tiles` has it of real masks.

`ratio` is the time by strips as a share of the time of what is done today, `share` what is formed
as a share of the dense product, `equal` the largest difference of the two gradients over the
largest entry.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import write_rows
from benchmarks.gpu_kernels import seconds
from leanlift.layers import Scratch
from leanlift.layers.cpu_product import has_products
from leanlift.ops import tile_ops
from leanlift.ops.reference import TorchOps, dense_product
from leanlift.ops.sampled import sampled_product_
from leanlift.ops.strips import strips_product
from leanlift.sparse import SegmentedIndex

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
RANK, SPREADS, DENSITIES = 64, (0.5, 1.0), (0.05, 0.01)
Form = Callable[[Tensor, Tensor, SegmentedIndex, Tensor], None]


def crowded(m: int, n: int, density: float, spread: float, device: torch.device) -> SegmentedIndex:
    """The largest entries of |L R^T|, rows and columns of which differ in size by e^spread."""
    generator = torch.Generator(device).manual_seed(0)

    def factor(rows: int) -> Tensor:
        scale = torch.randn(rows, 1, generator=generator, device=device).mul_(spread).exp_()
        return torch.randn(rows, RANK, generator=generator, device=device) * scale

    scores = (factor(m) @ factor(n).T).abs_().view(-1)
    flat = scores.topk(int(density * m * n), sorted=False).indices.sort().values
    return SegmentedIndex.from_flat(flat, (m, n))


def ways(device: torch.device) -> dict[str, Form]:
    """What forms the gradient on a device: today's way first, by strips last."""
    take = Scratch().take
    if device.type == "cuda":
        names = ("triton", "triton-strips")
        chosen = {name: tile_ops(name, device) for name in names}
        return {
            name: lambda left, right, index, out, ops=ops: ops.sampled_product(
                left, right, index, out, take
            )
            for name, ops in chosen.items()
        }
    gather = TorchOps().gather
    return {
        "sampled": sampled_product_,
        "dense": lambda left, right, index, out: dense_product(
            gather, left, right, index, out, take
        ),
        "strips": lambda left, right, index, out: strips_product(left, right, index, out, take),
    }


def measured(
    shape: tuple[int, int], density: float, spread: float, tokens: int, device: torch.device
) -> dict[str, Any]:
    """One row: times of each way on one mask."""
    (m, n), on_cpu = shape, device.type == "cpu"
    dtype = torch.float32 if on_cpu and not has_products(torch.bfloat16) else torch.bfloat16
    index = crowded(m, n, density, spread, device)
    left, right = (torch.randn(tokens, side, device=device).to(dtype) for side in shape)
    times, outs = {}, []
    for name, way in ways(device).items():
        out = torch.empty(index.count, dtype=dtype, device=device)
        way(left, right, index, out)  # strips are made here, once for a mask
        times[name] = seconds(lambda w=way, o=out: w(left, right, index, o))
        outs.append(out.float())
    today, strips = next(iter(times.values())), list(times.values())[-1]
    difference = float((outs[0] - outs[-1]).abs().max() / outs[0].abs().max())
    return {
        "shape": f"{m}x{n}",
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "density": density,
        "spread": spread,
        "share": round(index.strips.formed / (m * n), 4),
        "bytes an entry": round(index.strips.nbytes / index.count, 3),
        "ratio": round(strips / today, 3),
        "equal": f"{difference:.1e}",
        "ms": " ".join(f"{name} {1e3 * time:.3f}" for name, time in times.items()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes: whether it runs")
    small = parser.parse_args().small
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, tokens = SHAPES, 2048 if device.type == "cuda" else 512
    if small:
        shapes, tokens = ((256, 512),), 32
    torch.set_num_threads(1)
    rows = [
        measured(shape, density, spread, tokens, device)
        for shape in shapes
        for density in DENSITIES
        for spread in SPREADS
    ]
    for row in rows:
        print(row)
    if not small:
        print(f"Wrote {write_rows(f'strips_product-{device.type}', rows)}")


if __name__ == "__main__":
    main()
