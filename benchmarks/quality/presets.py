"""What each preset runs, in the order in which it matters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.quality.base import Size
from benchmarks.quality.loop import Schedule
from benchmarks.quality.methods import Build, Method, full, lift, lora, shira


def half_decades(*exponents: int) -> tuple[float, ...]:
    """10^(k/2) for each k."""
    return tuple(10 ** (k / 2) for k in exponents)


HEADLINE, QLORA = "leanlift principal, NF4", "QLoRA, NF4"
QUICK = 4  # methods of the quick form


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths.

    Attributes:
        size: of the base.
        pretraining_batch: rows of a pretraining batch.
        schedule: of a fine-tuning run.
        seeds: per method, at its best learning rate.
        train_rows, test_rows: per skill.
        r: the budget, r·(m+n) trained parameters per matrix, for all methods.
        approx_rank: R.
        intervals: of mask refreshes.
        budgets: other values of r.
        ranks: other values of R.
        lrs, full_lrs: learning rates to start the sweeps with; those of full fine-tuning.
    """

    size: Size
    pretraining_batch: int
    schedule: Schedule
    seeds: int
    train_rows: int
    test_rows: int
    r: int
    approx_rank: int
    intervals: tuple[int, ...]
    budgets: tuple[int, ...]
    ranks: tuple[int, ...]
    lrs: tuple[float, ...]
    full_lrs: tuple[float, ...]


CPU = Preset(
    size=Size(hidden=256, intermediate=768, layers=3),
    pretraining_batch=64,
    schedule=Schedule(steps=800, batch=16),
    seeds=3,
    train_rows=2000,
    test_rows=150,
    r=8,
    approx_rank=8,
    intervals=(10, 50, 100, 400),
    budgets=(2, 4, 16),
    ranks=(1, 64),
    lrs=half_decades(-7, -6, -5, -4),
    full_lrs=half_decades(-8, -7, -6, -5),
)
CPU_TEXT = replace(
    CPU,
    size=Size(steps=500),
    schedule=Schedule(steps=200, batch=8),
    r=4,
    approx_rank=4,
    lrs=half_decades(-6, -5, -4, -3),
    full_lrs=half_decades(-7, -6, -5, -4),
)
"""Real text has ten times as many tokens in a row."""
GPU = Preset(
    size=Size(hidden=768, intermediate=2048, layers=14, heads=12, kv_heads=12, steps=800, lr=5e-4),
    pretraining_batch=256,
    schedule=Schedule(steps=60, batch=64),
    seeds=3,
    train_rows=5000,
    test_rows=200,
    r=26,
    approx_rank=16,
    intervals=(20,),
    budgets=(),
    ranks=(),
    lrs=half_decades(-8, -7, -6, -5),
    full_lrs=half_decades(-10, -9, -8, -7),
)
TINY = Preset(
    size=Size(hidden=64, intermediate=64, layers=1, heads=2, kv_heads=2, steps=3),
    pretraining_batch=8,
    schedule=Schedule(steps=4, batch=8),
    seeds=2,
    train_rows=16,
    test_rows=8,
    r=2,
    approx_rank=2,
    intervals=(3,),
    budgets=(1,),
    ranks=(1,),
    lrs=half_decades(-6),
    full_lrs=half_decades(-6),
)
"""For the tests of the plumbing."""


def quick(preset: Preset) -> Preset:
    """Half the steps, a base of half the width, two seeds."""
    size = replace(
        preset.size, hidden=preset.size.hidden // 2, intermediate=preset.size.intermediate // 2
    )
    schedule = replace(preset.schedule, steps=preset.schedule.steps // 2)
    r = max(1, preset.r // 2)
    return replace(preset, size=size, schedule=schedule, r=r, approx_rank=r, seeds=2)


def methods(preset: Preset) -> Iterator[Method]:
    """All rows of the table, the most important first."""
    r, R = preset.r, preset.approx_rank

    def principal(kind: str = "nf4", budget: int = r, rank: int = R, **more: object) -> Build:
        return lift(kind, budget, approx_rank=rank, **more)

    yield Method(HEADLINE, "headline", principal(), preset.lrs, merge=True)
    yield Method(QLORA, "headline", lora("nf4", r), preset.lrs)
    yield Method(
        "leanlift magnitude, NF4", "headline", lift("nf4", r, selector="magnitude"), preset.lrs
    )
    yield Method("leanlift random, NF4", "headline", lift("nf4", r, selector="random"), preset.lrs)
    yield Method("full fine-tuning", "headline", full(), preset.full_lrs)
    yield Method("LoRA", "headline", lora("dense", r), preset.lrs)
    yield Method(
        "leanlift gradient, NF4", "headline", lift("nf4", r, selector="gradient"), preset.lrs
    )
    yield Method("SHiRA (PEFT), NF4", "headline", shira("nf4", r), preset.lrs)
    for kind, held in (("int8", "INT8"), ("dense", "32-bit")):
        yield Method(
            f"leanlift principal, {held}", "format", principal(kind), lr_of=HEADLINE, merge=True
        )
    for interval in preset.intervals:
        refreshed = principal(refresh_interval=interval)
        yield Method(f"refresh every {interval}", "refresh", refreshed, lr_of=HEADLINE)
    for rank in preset.ranks:
        yield Method(f"R={rank}", "rank", principal(rank=rank), lr_of=HEADLINE)
    for start in ("residual", "taken out"):
        yield Method(f"start: {start}", "start", principal(start=start), lr_of=HEADLINE, merge=True)
    for budget in preset.budgets:
        yield Method(f"leanlift r={budget}", "budget", principal(budget=budget), lr_of=HEADLINE)
    yield _with("warm-up 3 %", HEADLINE, principal(), warm_up=0.03)
    yield _with("beta2 0.999", HEADLINE, principal(), beta2=0.999)


def _with(name: str, parent: str, build: Build, **schedule: float) -> Method:
    return Method(name, "schedule", build, lr_of=parent, schedule=schedule)
