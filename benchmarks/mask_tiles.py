"""How much of the values' gradient could be skipped: which tiles of real masks hold entries.

    python -m benchmarks.mask_tiles CHECKPOINT [--blocks 0 10 20 29]

CHECKPOINT is a directory with a 16-bit `model.safetensors` of a Llama; `benchmarks.real_weights`
makes one of SmolLM2-135M-Instruct (`make_base`). Of the seven Linears of a few blocks, masks of the
principal entries at two ranks and three densities. The gradient of the values is entries of a dense
product; a product that forms tiles alone needs those that hold entries. Tiles are counted in four
orders of the matrix:

- `none`: as it is;
- `rows`: rows by their number of entries;
- `columns`: columns by theirs;
- `both`.

A tile of `1x128` is one row of 128 columns: what is formed where each strip of 128 columns has a
list of its own rows. `strips` are those lists as `leanlift.sparse.Strips` has them, in groups of
128 rows that are formed whole.

`share` is the area of tiles that hold entries, as a share of the matrix, ragged tiles by their real
size; `formed` is the same with every tile at its full size, as a product of whole tiles forms it:
small matrices are not much larger than a tile, and it may be above 1. `entries` are those in such a
tile, on average. `random` is the share of a random mask of as many entries, in the same order.
Claim: none; it decides what is worth building.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.common import write_rows
from leanlift.selection import Principal, count_by_density, select
from leanlift.sparse import STRIP, SegmentedIndex

RANKS = (8, 64)
DENSITIES = (0.05, 0.025, 0.01)
BLOCKS = (0, 10, 20, 29)
TILES = ((16, 16), (32, 32), (64, 64), (128, 128), (1, 64), (1, 128), (128, 1))
ORDERS = ("none", "rows", "columns", "both")
KINDS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


def ordered(mask: Tensor, order: str) -> Tensor:
    """A mask [m, n] with rows, columns or both by their number of entries, the most first."""
    if order in ("rows", "both"):
        mask = mask[mask.sum(1).argsort(descending=True, stable=True)]
    if order in ("columns", "both"):
        mask = mask[:, mask.sum(0).argsort(descending=True, stable=True)]
    return mask


def tiles_of(mask: Tensor, rows: int, columns: int) -> Tensor:
    """Entries of each tile of a mask [m, n]: int64 [ceil(m / rows), ceil(n / columns)]."""
    m, n = mask.shape
    down, across = -(-m // rows), -(-n // columns)
    padded = mask.new_zeros(down * rows, across * columns)
    padded[:m, :n] = mask
    return padded.view(down, rows, across, columns).sum((1, 3))


def counted(mask: Tensor, rows: int, columns: int) -> dict[str, float]:
    """What a product of tiles has to form for a mask [m, n]."""
    m, n = mask.shape
    tiles = tiles_of(mask, rows, columns)
    areas = tiles_of(torch.ones_like(mask), rows, columns)
    held = tiles > 0
    return {
        "share": float(areas[held].sum()) / (m * n),
        "formed": int(held.sum()) * rows * columns / (m * n),
        "entries": float(tiles[held].double().mean()) if bool(held.any()) else 0.0,
    }


def random_like(mask: Tensor, generator: torch.Generator) -> Tensor:
    """As many entries anywhere."""
    order = torch.randperm(mask.numel(), generator=generator)
    return mask.view(-1)[order].view_as(mask)


def masks(checkpoint: Path, blocks: list[int]) -> Iterator[tuple[str, int, float, Tensor]]:
    """(kind, rank, density, mask [m, n] bool) of the principal entries of a checkpoint."""
    with safe_open(checkpoint / "model.safetensors", "pt") as file:
        for block in blocks:
            for kind in KINDS:
                weight = file.get_tensor(f"model.layers.{block}.{kind}.weight").float()
                for rank in RANKS:
                    for density in DENSITIES:
                        count = count_by_density(weight.shape, density)
                        mask = torch.zeros(weight.numel(), dtype=torch.bool)
                        mask[select(weight, Principal(rank=rank), count)] = True
                        yield kind, rank, density, mask.view_as(weight)


def by_lists(mask: Tensor) -> dict[str, float]:
    """What `leanlift.sparse.Strips` has of a mask [m, n]; `entries`: in a group of rows."""
    m, n = mask.shape
    index = SegmentedIndex.from_flat(mask.view(-1).nonzero().squeeze(1), (m, n))
    strips = index.strips
    listed = (strips.rows >= 0).sum(1)
    widths = (n - strips.strips * STRIP).clamp(max=STRIP)
    return {
        "share": float((listed * widths).sum()) / (m * n),
        "formed": strips.formed / (m * n),
        "entries": index.count / max(1, listed.numel()),
    }


def of_mask(
    mask: Tensor, generator: torch.Generator
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(order, tile, what is formed of a mask)."""
    like = random_like(mask, generator)
    for order in ORDERS:
        one, other = ordered(mask, order), ordered(like, order)
        for rows, columns in TILES:
            found = counted(one, rows, columns)
            found["random"] = counted(other, rows, columns)["share"]
            yield order, f"{rows}x{columns}", found
    yield "columns", "strips", {**by_lists(mask), "random": by_lists(like)["share"]}


def measured(checkpoint: Path, blocks: list[int]) -> list[dict[str, Any]]:
    """Means over blocks by kind, rank, density, order and tile."""
    generator = torch.Generator().manual_seed(0)
    found: dict[tuple[Any, ...], list[dict[str, float]]] = defaultdict(list)
    for kind, rank, density, mask in masks(checkpoint, blocks):
        shape = "x".join(map(str, mask.shape))
        for order, tile, one in of_mask(mask, generator):
            found[kind, shape, rank, density, order, tile].append(one)
    names = ("kind", "shape", "rank", "density", "order", "tile")
    return [
        dict(zip(names, key, strict=True))
        | {"blocks": " ".join(map(str, blocks))}
        | {name: round(sum(one[name] for one in ones) / len(ones), 4) for name in ones[0]}
        for key, ones in found.items()
    ]


def of_a_block(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of all kinds together, weighted by the area of their matrices."""
    area = {row["kind"]: math.prod(map(int, row["shape"].split("x"))) for row in rows}
    found: dict[tuple[Any, ...], Counter[str]] = defaultdict(Counter)
    for row in rows:
        sums = found[row["rank"], row["density"], row["order"], row["tile"]]
        for name in ("share", "formed", "random"):
            sums[name] += row[name] * area[row["kind"]] / sum(area.values())
    names = ("rank", "density", "order", "tile")
    return [
        dict(zip(names, key, strict=True)) | {name: round(s, 2) for name, s in sums.items()}
        for key, sums in found.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(BLOCKS))
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = measured(args.checkpoint, args.blocks)
    for row in of_a_block(rows):
        print(row)
    print(f"Wrote {write_rows('mask_tiles', rows)}")


if __name__ == "__main__":
    main()
