"""Selection at real sizes: whether the mask is the exact one, what it costs in time and memory.

    python -m benchmarks.selection [PART ...] [--quick] [--blocks N]

overlap: the mask is that of a float64 SVD of the same weights (0.999 wherever that is unique).
time: at least 15 times as fast as an fp32 SVD; growth with the number of entries.
formats: how much of the mask of the original weights a quantized base keeps.
selectors: what each selector costs, and how far its mask is from the principal one.
llama2_7b: all matrices of Llama-2-7B's shapes, one after another.

Without PART all run, on one CPU thread. `--quick` is a smoke test: small shapes, no CSV, no bar for
time. The exit status is 1 if a bar is missed.
"""

# ruff: noqa: E402 -- bitsandbytes logs on import about a kernel package that is not used here.

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from functools import partial
from statistics import median
from typing import Any, NamedTuple

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.common import timed, write_rows
from benchmarks.real_matrix import trained_like
from leanlift.measure import LiveBytes, MemoryMeter, PhasePeak
from leanlift.selection import (
    Gradient,
    Magnitude,
    Principal,
    Random,
    Scorer,
    count_by_density,
    select,
    selection,
    selection_nbytes,
)
from leanlift.tiles import RowTiles
from leanlift.weights.quantized import WeightFormat, requantize

Shape = tuple[int, int]
Case = tuple[Shape, str, WeightFormat]
CPU, MIB = torch.device("cpu"), 2**20
RANKS, DENSITY = (16, 64, 128), 0.05
OVERLAP_BAR, TIME_BAR = 0.999, 15.0
MIN_GAP = 1e-4  # with a smaller gap behind s_R, the mask is not unique

NF4_DOUBLE = WeightFormat("nf4", "bfloat16", 64, double=True)
NF4, FP4 = WeightFormat("nf4", "bfloat16", 64), WeightFormat("fp4", "bfloat16", 64)
INT8 = WeightFormat("int8", "float32")
BF16, FP32 = WeightFormat("dense", "bfloat16"), WeightFormat("dense", "float32")


def tidy(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    return f"{value[0]}x{value[1]}" if isinstance(value, tuple) else value


class Table:
    """Rows that are printed as they come, and written to a CSV at the end."""

    def __init__(self, name: str, columns: str) -> None:
        self.name, self.columns = name, columns.split()
        self.rows: list[dict[str, Any]] = []

    def add(self, *values: Any) -> None:
        row = [tidy(value) for value in values]
        for line in (row,) if self.rows else (self.columns, row):
            print("".join(f"{value!s:<15}" for value in line), flush=True)
        self.rows.append(dict(zip(self.columns, row, strict=True)))

    def save(self, args: argparse.Namespace) -> None:
        if not args.quick:
            print(f"Wrote {write_rows(self.name, self.rows)}")


def product(m: int, n: int, rank: int = 40, seed: int = 0) -> Tensor:
    """Of exactly this rank, singular values about i^-0.6."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.randn(m, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.6
    return left @ torch.randn(rank, n, generator=generator)


def noisy(shape: Shape, seed: int) -> Tensor:
    """A product of rank 256 plus noise: cheap to make by the hundred."""
    weight = product(*shape, 256, seed)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(~seed))
    return weight.add_(noise, alpha=0.3 * float(weight.std())).mul_(0.01)


def flat_spectrum(m: int, n: int) -> Tensor:
    """Orthonormal along the smaller side: every singular value is 1."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(max(m, n), min(m, n), generator=generator)).Q
    return basis if m >= n else basis.T.contiguous()


SPECTRA = {"trained-like": trained_like, "low rank": product, "flat": flat_spectrum}


class Factors(NamedTuple):
    """left[:, :R] @ right[:, :R]^T is a best rank-R approximation; sigma is descending."""

    left: Tensor
    right: Tensor
    sigma: Tensor

    def flat(self, rank: int, count: int) -> Tensor:
        """Its `count` entries of largest magnitude, in no order."""
        scores = (self.left[:, :rank] @ self.right[:, :rank].T).abs_()
        return torch.topk(scores.flatten(), count, sorted=False).indices

    def gap(self, rank: int) -> float:  # (s_R - s_{R+1}) / s_R
        return float(1 - self.sigma[rank] / self.sigma[rank - 1])

    def unique(self, rank: int) -> bool:
        """Whether its mask is: there is a gap behind R, or nothing at all."""
        return self.gap(rank) >= MIN_GAP or bool(self.sigma[rank] <= 1e-6 * self.sigma[0])


def by_gram(wide: Tensor, most: int) -> Factors:
    """The SVD's first `most` directions, from the Gram matrix of the smaller side (fp64)."""
    tall = wide if wide.shape[0] >= wide.shape[1] else wide.T
    squares, vectors = torch.linalg.eigh(tall.T @ tall)
    right = vectors.flip(1)[:, :most]
    pair = (tall @ right, right) if tall is wide else (right, tall @ right)
    return Factors(*pair, squares.flip(0).clamp_min(1e-300).sqrt())


def by_svd(weight: Tensor) -> Factors:
    u, sigma, vh = torch.linalg.svd(weight, full_matrices=False)
    return Factors(u * sigma, vh.T, sigma)


def overlap_of(flat: Tensor, other: Tensor, shape: Shape) -> float:
    """Share of the positions `flat` that are among the positions `other`."""
    mask = torch.zeros(shape[0] * shape[1], dtype=torch.bool)
    mask[other] = True
    return float(mask[flat].double().mean())


def rule_mib(scorer: Scorer, tiles: RowTiles, count: int) -> float:
    return selection_nbytes(scorer, tiles.shape, count, itemsize=tiles.dtype.itemsize) / MIB


def overlap(args: argparse.Namespace) -> list[str]:
    """Ours against float64, by shape, spectrum, format and rank."""
    columns = "shape spectrum format rank overlap converged seconds gap unique oracle_check"
    table = Table("selection_overlap", columns)
    for case in overlap_cases(args.quick):
        overlap_rows(table, case, RANKS[: 2 if args.quick else 3])
    unique = [row for row in table.rows if row["unique"]]
    missed = [row for row in unique if row["overlap"] < OVERLAP_BAR]
    others = [row for row in table.rows if not row["unique"]]
    doubted, known = (sum(not row["converged"] for row in rows) for rows in (unique, others))
    check = min(row["oracle_check"] for row in unique if row["oracle_check"] != "")
    kept = f"{len(unique) - len(missed)} of {len(unique)}"
    print(f"{kept} unique masks reach {OVERLAP_BAR}; {doubted} unique ones say converged=False.")
    print(f"{len(others)} masks are not unique; {known} of them say converged=False, as expected.")
    print(f"The unique masks of the two oracles overlap by {check} or more.")
    table.save(args)
    message = "{shape} {spectrum} {format} rank {rank}: overlap {overlap}, converged={converged}"
    return [message.format(**row) for row in missed]


def overlap_cases(quick: bool) -> Iterator[Case]:
    small: list[Shape] = [(1000, 1536)] if quick else [(1024, 4096), (1000, 1536)]
    large: list[Shape] = [] if quick else [(4096, 4096), (11008, 4096), (4096, 11008)]
    for shape in (*small, *large):
        yield from ((shape, spectrum, NF4_DOUBLE) for spectrum in SPECTRA)
        if shape in (*small, (4096, 4096)):
            yield from ((shape, "trained-like", fmt) for fmt in (FP4, NF4, INT8, BF16))
    for shape in small:  # quantizing blurs an exact rank and equal singular values
        yield from ((shape, spectrum, FP32) for spectrum in ("low rank", "flat"))


def overlap_rows(table: Table, case: Case, ranks: tuple[int, ...]) -> None:
    shape, spectrum, fmt = case
    tiles = requantize(SPECTRA[spectrum](*shape), fmt, CPU)
    wide = tiles.rows(0, shape[0]).double()
    exact, count = by_gram(wide, max(ranks)), count_by_density(shape, DENSITY)
    other = by_svd(wide) if min(shape) <= 1024 else None
    for rank in ranks:
        found, seconds = timed(partial(selection, tiles, Principal(rank), count))
        flat = exact.flat(rank, count)
        check = "" if other is None else overlap_of(other.flat(rank, count), flat, shape)
        result = (overlap_of(found.flat, flat, shape), found.converged, seconds)
        oracle = (exact.gap(rank), exact.unique(rank), check)
        table.add(shape, spectrum, fmt, rank, *result, *oracle)


def time(args: argparse.Namespace) -> list[str]:
    """Ours against torch's SVD in fp32, and ours at growing sizes."""
    table = Table("selection_time", "shape method runs seconds s_per_million ratio overlap")
    more = [(1024, 1024), (2048, 2048), (4096, 11008)]
    for shape in [(1024, 1024)] if args.quick else [(4096, 4096), *more]:
        weight, count = trained_like(*shape), count_by_density(shape, DENSITY)
        ours = partial(timed, partial(select, weight, Principal(128), count))
        (flat, first), million = ours(), weight.numel() / 1e6
        # The SVD comes between our runs, so that both see the same machine.
        dense, svd = timed(partial(svd_flat, weight, count)) if not table.rows else (None, 0.0)
        seconds = median([first, ours()[1], ours()[1]])
        table.add(shape, "principal 128", 3, seconds, seconds / million, "", "")
        if dense is not None:
            comparison = (svd / seconds, overlap_of(flat, dense, shape))
            table.add(shape, "SVD + top-k", 1, svd, svd / million, *comparison)
    table.save(args)
    ratio = table.rows[1]["ratio"]
    fast = args.quick or ratio >= TIME_BAR
    return [] if fast else [f"the SVD takes {ratio} times as long, expected {TIME_BAR:g}"]


def svd_flat(weight: Tensor, count: int) -> Tensor:
    return by_svd(weight).flat(128, count)


def formats(args: argparse.Namespace) -> list[str]:
    """Masks of quantized weights against masks of the weights they were quantized from."""
    table = Table("selection_formats", "shape scorer density format overlap converged")
    scorers: dict[str, Scorer] = {f"principal {rank}": Principal(rank) for rank in RANKS}
    for shape in [(1000, 1536)] if args.quick else [(1024, 4096), (4096, 4096)]:
        weight = trained_like(*shape)
        bases = [(fmt, requantize(weight, fmt, CPU)) for fmt in (NF4_DOUBLE, FP4, INT8)]
        for name, scorer in (scorers | {"magnitude": Magnitude()}).items():
            for density in (0.01, DENSITY, 0.1):
                count = count_by_density(shape, density)
                original = selection(weight, scorer, count)
                for fmt, tiles in bases:
                    found = selection(tiles, scorer, count)
                    same = overlap_of(found.flat, original.flat, shape)
                    both = found.converged and original.converged
                    table.add(shape, name, density, fmt, same, both)
    table.save(args)
    return []


def selectors(args: argparse.Namespace) -> list[str]:
    """Each selector on one NF4 matrix, which the dense baselines have to dequantize first."""
    m, n = shape = (1024, 1024) if args.quick else (4096, 4096)
    table = Table("selection_selectors", "selector entries seconds peak_mib rule_mib overlap")
    tiles = requantize(trained_like(m, n), NF4_DOUBLE, CPU)
    count = count_by_density(shape, DENSITY)
    exact = by_gram(tiles.rows(0, m).double(), 64).flat(64, count)
    scorers: dict[str, Scorer] = {
        "principal": Principal(64),
        "blocks of 4": Principal(64, block=4),
        "magnitude": Magnitude(),
        "random": Random(),
        "gradient": Gradient(torch.randn(m, n, generator=torch.Generator().manual_seed(1))),
    }
    runs = {name: partial(select, tiles, scorer, count) for name, scorer in scorers.items()}
    runs["lowrank q=6"] = partial(lowrank_flat, tiles, 6, 6, count)
    runs["lowrank q=72"] = partial(lowrank_flat, tiles, 72, 64, count)
    for name, run in runs.items():
        with LiveBytes() as live:  # also warms up
            run()
        flat, seconds = timed(run)
        rule = rule_mib(scorers[name], tiles, count) if name in scorers else ""
        peak, same = live.peak / MIB, overlap_of(flat, exact, shape)
        table.add(name, flat.numel(), seconds, peak, rule, same)
    table.save(args)
    return []


def lowrank_flat(tiles: RowTiles, q: int, rank: int, count: int) -> Tensor:
    """torch.svd_lowrank with its default number of iterations, cut to R, and a dense top-k."""
    torch.manual_seed(0)
    u, sigma, v = torch.svd_lowrank(tiles.rows(0, tiles.shape[0]).float(), q=q, niter=2)
    return Factors(u * sigma, v, sigma).flat(rank, count)


def llama2_7b(args: argparse.Namespace) -> list[str]:
    """Principal(64) on matrices of Llama-2-7B's shapes; peaks while selecting; making not timed."""
    hidden, inner = (1024, 2752) if args.quick else (4096, 11008)
    block = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)]
    scorer, meter = Principal(64), MemoryMeter(CPU)
    runs: list[tuple[Shape, PhasePeak, bool, float]] = []
    for seed, shape in enumerate(tqdm(block * args.blocks, desc="selecting", unit="matrix")):
        tiles = requantize(noisy(shape, seed), NF4_DOUBLE, CPU)
        count = count_by_density(shape, DENSITY)
        with meter.phase("select", follow=True) as peak:
            found = selection(tiles, scorer, count)
        runs.append((shape, peak, found.converged, rule_mib(scorer, tiles, count)))
    columns = "shape blocks matrices seconds mean_seconds unconverged peak_mib rule_mib rss_mib"
    table = Table("selection_llama2_7b", columns)
    for wanted in (*dict.fromkeys(block), None):
        of_shape = [run[1:] for run in runs if wanted in (None, run[0])]
        peaks, converged, rules = zip(*of_shape, strict=True)
        seconds = sum(peak.seconds for peak in peaks)
        tensors, rss = max(p.tensors or 0 for p in peaks), max(p.resident or 0 for p in peaks)
        matrices = (f"{args.blocks} of 32", len(peaks), seconds, seconds / len(peaks))
        result = (converged.count(False), tensors / MIB, max(rules), rss / MIB)
        table.add(wanted or "all", *matrices, *result)
    table.save(args)
    return []


# Each returns the bars it missed.
PARTS = {part.__name__: part for part in (overlap, time, formats, selectors, llama2_7b)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.selection")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--quick", action="store_true", help="small shapes only, no CSV")
    parser.add_argument("--blocks", type=int, default=1, help="of llama2_7b, 1 to 32 (default 1)")
    args = parser.parse_args()
    if not set(args.parts) <= set(PARTS) or not 1 <= args.blocks <= 32:
        parser.error(f"expected parts among {', '.join(PARTS)}, and 1 to 32 blocks")
    torch.set_num_threads(1)
    missed: list[str] = []
    for name in args.parts or PARTS:
        print(f"\n{name}: {PARTS[name].__doc__}", flush=True)
        missed += PARTS[name](args)
    if missed:
        raise SystemExit("\nMissed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
