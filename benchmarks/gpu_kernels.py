"""The kernels of `leanlift.ops` on plain tensors: errors, times, bandwidth. Without bitsandbytes.

A part of `gpu_proof`. Weights are random codes and scales in bitsandbytes' layout; the truth is
dequantized and patched in fp64 by a few lines of torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks import card
from benchmarks.common import timed
from leanlift.layers.gradient_rows import cached_rows
from leanlift.layers.workspace import Scratch
from leanlift.ops import EightBit, FourBit, Scales, TileOps, tile_ops
from leanlift.sparse import Offsets, SegmentedIndex
from leanlift.tiles import row_ranges

BANDWIDTH_BAR = 0.7
Rows = list[dict[str, Any]]


@dataclass
class Toy:
    """A stored matrix as a source of rows; `wide(dtype)` dequantizes in any dtype."""

    form: FourBit | EightBit | Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    def wide(self, dtype: torch.dtype) -> Tensor:
        if isinstance(self.form, Tensor):
            return self.form.to(dtype)
        if isinstance(self.form, EightBit):
            return self.form.codes.to(dtype) * self.form.scales.to(dtype)[:, None] * (1 / 127)
        held = self.form
        codes = torch.stack([held.packed >> 4, held.packed & 15], 1).view(-1)
        scale, numel = held.absmax, self.shape[0] * self.shape[1]
        if held.nested is not None:
            inner = held.nested
            outer = inner.absmax.repeat_interleave(inner.blocksize)[: scale.numel()]
            scale = inner.table[scale.long()].to(dtype) * outer.to(dtype) + inner.offset.to(dtype)
        scale = scale.to(dtype).repeat_interleave(held.blocksize)[:numel]
        return (held.table[codes[:numel].long()].to(dtype) * scale).view(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        if isinstance(self.form, Tensor):  # views, as a dense weight's are
            return self.form[start:stop]
        return self.wide(torch.float32).to(self.dtype)[start:stop].contiguous()


class StoredToy(Toy):
    def stored(self) -> FourBit | EightBit:
        assert not isinstance(self.form, Tensor)
        return self.form


def toys(m: int, n: int, device: torch.device, dtype: torch.dtype) -> dict[str, Toy]:
    """A matrix in every format."""
    blocks, table = -(-m * n // 64), torch.linspace(-1, 1, 16, device=device) ** 3
    packed = torch.randint(0, 256, (-(-m * n // 2),), device=device, dtype=torch.uint8)
    codes = torch.randint(-127, 128, (m, n), device=device, dtype=torch.int8)
    inner = Scales(
        torch.rand(-(-blocks // 256), device=device) / 50,
        torch.linspace(-1, 1, 256, device=device),
        torch.tensor(0.03, device=device),
        256,
    )
    scales = torch.rand(blocks, device=device) / 20
    small = torch.randint(0, 256, (blocks,), device=device, dtype=torch.uint8)
    return {
        "4 bits": StoredToy(FourBit(packed, scales, table, 64, None), (m, n), dtype),
        "4 bits, double": StoredToy(FourBit(packed, small, table, 64, inner), (m, n), dtype),
        "int8": StoredToy(
            EightBit(codes, torch.rand(m, device=device) / 20), (m, n), torch.float32
        ),
        "dense": Toy(0.02 * torch.randn(m, n, device=device).to(dtype), (m, n), dtype),
    }


def random_index(m: int, n: int, density: float, device: torch.device) -> SegmentedIndex:
    flat = (torch.rand(m * n, device=device) < density).nonzero().view(-1)
    return SegmentedIndex.from_flat(flat, (m, n))


def implementations(device: torch.device) -> list[TileOps]:
    """All that can compute on the device."""
    return [tile_ops(name, device) for name in names_of(device)]


def names_of(device: torch.device) -> list[str]:
    return ["torch", "triton"] if device.type == "cuda" else ["torch"]


def kernels(device: torch.device, small: bool) -> Rows:
    """Every format and operation against fp64, then times on the largest shape."""
    shapes = [(64, 512), (65, 1100), (33, 257)] + ([] if small else [(4096, 11008)])
    rows: Rows = []
    for (m, n), dtype in ((s, d) for s in shapes for d in (torch.float32, torch.bfloat16)):
        index = random_index(m, n, 0.05, device)
        stores = [Offsets(index, torch.randn(index.count, device=device))]
        for name, toy in toys(m, n, device, dtype).items():
            errors = {ops.name: _error(ops, toy, stores, dtype) for ops in implementations(device)}
            rows.append(_compared(f"effective {name} {m}x{n} {str(dtype)[6:]}", errors, dtype))
        dense = torch.randn(m, n, device=device).to(dtype)
        flat, part = index.to_flat(), index.part(0, m)
        for ops in implementations(device):
            out = torch.empty(index.count, device=device)
            ops.gather(dense, part, out)
            exact = torch.equal(out, dense.view(-1)[flat].float())
            what = f"gather {m}x{n} {str(dtype)[6:]}, {ops.name}, equal"
            rows.append({"what": what, "value": exact, "bar": "True", "holds": exact})
    return rows + _times(device, small) + gradients(device, small)


def _error(ops: TileOps, toy: Toy, stores: list[Offsets], dtype: torch.dtype) -> float:
    out = torch.empty(toy.shape, dtype=dtype, device=stores[0].values.device)
    step = toy.shape[0]
    ops.effective_rows(toy, stores, 0, step, out)
    truth = toy.wide(torch.float64)
    truth.view(-1)[stores[0].index.to_flat()] += stores[0].values.double()
    return float((out.double() - truth).norm() / truth.norm())


def _compared(what: str, errors: dict[str, float], dtype: torch.dtype) -> dict[str, Any]:
    """A kernel's error may be torch's plus a hundredth of an epsilon."""
    bar = errors["torch"] + torch.finfo(dtype).eps / 100
    value = errors.get("triton", errors["torch"])
    return {"what": what, "value": f"{value:.2e}", "bar": f"{bar:.2e}", "holds": value <= bar}


def _times(device: torch.device, small: bool) -> Rows:
    m, n = (64, 512) if small else (4096, 11008)
    dtype = torch.float32 if small else torch.bfloat16
    index = random_index(m, n, 0.05, device)
    stores = [Offsets(index, torch.randn(index.count, device=device).to(dtype))]
    out = torch.empty(m, n, dtype=dtype, device=device)
    gathered = torch.empty(index.count, dtype=dtype, device=device)
    source = torch.empty(2**20 if small else 2**29, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / seconds(lambda: target.copy_(source))
    rows: Rows = [{"what": "copy bandwidth, GB/s", "value": round(copy / 1e9, 1)}]
    for name, toy in toys(m, n, device, dtype).items():
        moved = out.nbytes + _stored(toy) + index.nbytes + stores[0].values.nbytes
        for ops in implementations(device):
            if ops.name == "torch" and name != "dense":
                continue  # a toy's own dequantization is no reference for time
            took = seconds(lambda o=ops, t=toy: o.effective_rows(t, stores, 0, m, out))
            share = moved / took / copy
            row = {"what": f"effective {name} {m}x{n}, {ops.name}, ms", "value": 1e3 * took}
            rows.append({**row, "value": round(row["value"], 4)})
            if ops.name == "triton":
                bar = {"bar": f">= {BANDWIDTH_BAR}", "holds": share >= BANDWIDTH_BAR}
                what = f"effective {name} {m}x{n}, share of the copy bandwidth"
                rows.append({"what": what, "value": round(share, 3), **bar})
    for ops in implementations(device):
        took = seconds(lambda o=ops: o.gather(out, index.part(0, m), gathered))
        what = f"gather {m}x{n}, {ops.name}, ms"
        rows.append({"what": what, "value": round(1e3 * took, 4)})
    return rows


def gradients(device: torch.device, small: bool) -> Rows:
    """Forming the gradients of values: all rows at once, and so many that their product is still in
    the cache when it is gathered from. A layer takes these where a product is worth a launch."""
    tokens, m, n = (64, 256, 512) if small else (2048, 4096, 11008)
    dtype = torch.float32 if small else torch.bfloat16
    index, scratch = random_index(m, n, 0.05, device), Scratch()
    left, right = (torch.randn(tokens, k, device=device).to(dtype) for k in (m, n))
    out = torch.empty(index.count, dtype=dtype, device=device)
    cache = card.cache() if card.present() else (2**19, 1)
    some = cached_rows(m, n, dtype.itemsize, *cache)
    rows: Rows = []
    for ops in implementations(device):
        for step in dict.fromkeys((m, some)):
            parts = [
                (left[:, a:b], index.part(a, b), out[slice(*index.span(a, b))])
                for a, b in row_ranges(m, step)
            ]

            def formed(ops: TileOps = ops, parts: Any = parts) -> None:
                for some_left, part, place in parts:
                    ops.sampled_product(some_left, right, part, place, scratch.take)

            what = f"gradients {m}x{n}, {tokens} tokens, {step} rows at once, {ops.name}, ms"
            rows.append({"what": what, "value": round(1e3 * seconds(formed), 4)})
    return rows


def _stored(toy: Toy) -> int:
    form = toy.form
    if isinstance(form, Tensor):
        return form.nbytes
    if isinstance(form, EightBit):
        return form.codes.nbytes + form.scales.nbytes
    return form.packed.nbytes + form.absmax.nbytes


def seconds(function: Callable[[], Any], repeats: int = 9) -> float:
    """Median of a few calls after two to warm up. On CUDA ten calls at a time are replayed from a
    graph, so that what the host does between launches does not count; what cannot be captured is
    launched ten times in a row."""
    many = 10 if card.present() else 1

    def run() -> None:
        for _ in range(many):
            function()

    run()
    run()
    replay = card.replayed(run) if card.present() else run
    return median(timed(replay)[1] for _ in range(repeats)) / many
