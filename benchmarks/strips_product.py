"""The values' gradient by strips of sorted columns beside what is done today: a ratio in one run.

    python -m benchmarks.strips_product [--small]

On a GPU: the dense product and the gather (`ops=triton`) and the product by strips
(`ops=triton-strips`). On a CPU: the sampled product, the dense product and a gather, and the
product by strips in plain torch. At the shapes of Llama-2-7B's Linears with 2048 tokens (on a CPU
512) in bf16 (on a CPU that has no such products in fp32), on masks of 5 % and 1 % whose entries
crowd as in a trained matrix: the largest of |L R^T| with L and R of lognormal row sizes. How much
of a mask is formed depends on how it crowds, so the share stands beside each ratio;
`benchmarks.mask_tiles` has it of real masks. On a CPU also masks of whole 16 x 16 blocks, whose
gradient is formed by a product for each row of blocks: no entry more than is needed.

`ratio` is the time by strips, or by blocks, as a share of the time of what is done today, `share`
what is formed as a share of the dense product, `equal` the largest difference of the two gradients
over the largest entry.
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
BLOCK = 16
Form = Callable[[Tensor, Tensor, SegmentedIndex, Tensor], None]


def scores(m: int, n: int, spread: float, device: torch.device) -> Tensor:
    """|L R^T| [m, n], rows and columns of which differ in size by e^spread."""
    generator = torch.Generator(device).manual_seed(0)

    def factor(rows: int) -> Tensor:
        scale = torch.randn(rows, 1, generator=generator, device=device).mul_(spread).exp_()
        return torch.randn(rows, RANK, generator=generator, device=device) * scale

    return (factor(m) @ factor(n).T).abs_()


def crowded(
    shape: tuple[int, int], density: float, spread: float, device: torch.device
) -> SegmentedIndex:
    """The largest entries of `scores`."""
    found = scores(*shape, spread, device).view(-1)
    flat = found.topk(int(density * found.numel()), sorted=False).indices.sort().values
    return SegmentedIndex.from_flat(flat, shape)


def in_blocks(
    shape: tuple[int, int], density: float, spread: float, device: torch.device
) -> SegmentedIndex:
    """The whole blocks of `scores` with the largest sums."""
    (m, n), found = shape, scores(*shape, spread, device)
    sums = found.view(m // BLOCK, BLOCK, n // BLOCK, BLOCK).sum((1, 3))
    chosen = torch.zeros(sums.numel(), dtype=torch.bool, device=device)
    chosen[sums.view(-1).topk(int(density * sums.numel())).indices] = True
    every = chosen.view_as(sums).repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return SegmentedIndex.from_flat(every.view(-1).nonzero().view(-1), shape)


def blocks_product(left: Tensor, right: Tensor, index: SegmentedIndex, out: Tensor) -> None:
    """The gradient of a mask of whole blocks, in fp32: a product for each row of blocks."""
    m, n = index.shape
    rows, columns = left.T.float().contiguous(), right.T.float().contiguous()
    flat = index.to_flat()
    first = flat[(flat % BLOCK == 0) & (flat // n % BLOCK == 0)]  # of each block
    counts = torch.bincount(first // n // BLOCK, minlength=m // BLOCK).tolist()
    needed = columns.view(n // BLOCK, -1).index_select(0, first % n // BLOCK)
    needed, done = needed.view(-1, left.shape[0]), 0
    for row, count in enumerate(counts):
        here = slice(done * BLOCK, (done + count) * BLOCK)
        product = rows[row * BLOCK : (row + 1) * BLOCK] @ needed[here].T
        out[done * BLOCK**2 : (done + count) * BLOCK**2] = product.view(-1)
        done += count


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
    shape: tuple[int, int],
    density: float,
    spread: float,
    tokens: int,
    device: torch.device,
    blocks: bool = False,
) -> dict[str, Any]:
    """One row: times of each way on one mask, of whole `blocks` or not."""
    (m, n), on_cpu = shape, device.type == "cpu"
    dtype = torch.float32 if on_cpu and not has_products(torch.bfloat16) else torch.bfloat16
    index = (in_blocks if blocks else crowded)(shape, density, spread, device)
    compared = {"sampled": sampled_product_, "blocks": blocks_product} if blocks else ways(device)
    left, right = (torch.randn(tokens, side, device=device).to(dtype) for side in shape)
    times, outs = {}, []
    for name, way in compared.items():
        out = torch.empty(index.count, dtype=dtype, device=device)
        way(left, right, index, out)  # strips are made here, once for a mask
        times[name] = seconds(lambda w=way, o=out: w(left, right, index, o))
        outs.append(out.float())
    today, other = next(iter(times.values())), list(times.values())[-1]
    difference = float((outs[0] - outs[-1]).abs().max() / outs[0].abs().max())
    return {
        "shape": f"{m}x{n}",
        "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."),
        "density": density,
        "spread": spread,
        "mask": f"{BLOCK} x {BLOCK} blocks" if blocks else "entries",
        "share": density if blocks else round(index.strips.formed / (m * n), 4),
        "bytes an entry": 0 if blocks else round(index.strips.nbytes / index.count, 3),
        "ratio": round(other / today, 3),
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
        measured(shape, density, spread, tokens, device, blocks)
        for shape in shapes
        for density in DENSITIES
        for spread in SPREADS
        for blocks in ((False, True) if device.type == "cpu" else (False,))
    ]
    for row in rows:
        print(row)
    if not small:
        print(f"Wrote {write_rows(f'strips_product-{device.type}', rows)}")


if __name__ == "__main__":
    main()
