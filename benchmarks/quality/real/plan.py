"""Which methods are run, at which budgets, and where their sweeps begin."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from benchmarks.quality.real.candidates import (
    blocks,
    by_gradient,
    chosen,
    each,
    from_original,
    gradient_alone,
    off_principal,
    principal,
    rows,
    times_gradient,
)
from benchmarks.quality.real.methods import Build, full, leanlift, lora, shira, super_tuning
from benchmarks.quality.real.steps import Schedule
from benchmarks.quality.real.texts import Lengths

PRINCIPAL, QLORA = "leanlift principal, NF4", "QLoRA, NF4"
PRINCIPAL_16 = "leanlift principal, 16 bits"
GRADIENT, RS_LORA = "leanlift gradient, NF4", "QLoRA (rsLoRA), NF4"
RANDOM, SHIRA = "leanlift random, NF4", "SHiRA (PEFT), NF4"
NF4, BITS_16, BITS_32 = "nf4", "16", "32"


@dataclass(frozen=True)
class Method:
    """One row of a table.

    Attributes:
        name: in the table.
        group: "headline", "variant" or "candidate".
        form: how the base is held, whose losses before are those to compare with.
        build: makes it.
        lrs: half decades (exponents of the root of 10) that the sweep begins with; it goes on
            where the best is at an end.
        later: the same at smaller budgets, which want larger rates.
    """

    name: str
    group: str
    form: str
    build: Build
    lrs: tuple[int, ...]
    later: tuple[int, ...] = ()


@dataclass(frozen=True)
class Preset:
    """Sizes and lengths.

    Attributes:
        lengths, schedule: of the rows, and of a run.
        densities: budgets, as shares of the Linears' weights; the first has all methods.
        seeds: of the headline's rows at their best learning rate; all else has one.
        quick: methods that are run, if not all.
        refined: whether sweeps at the first budget go on in quarter decades.
        resamples: of the bootstrap.
    """

    lengths: Lengths = field(default_factory=Lengths)
    schedule: Schedule = field(default_factory=Schedule)
    densities: tuple[float, ...] = (0.05, 0.025, 0.01)
    seeds: int = 2
    only: tuple[str, ...] = ()
    refined: bool = True
    resamples: int = 2000


REAL = Preset()
QUICK = Preset(
    Lengths(valid=10, test=16, source=4, probes=3),
    Schedule(steps=8, batch=3),
    densities=(0.05,),
    seeds=1,
    only=(PRINCIPAL, QLORA, RANDOM, SHIRA),
    refined=False,
)


@dataclass(frozen=True)
class Job:
    """A method at a budget: one sweep that begins with the half decades `lrs`, `refined` to quarter
    decades around its best learning rate or not, then more seeds at the best."""

    method: Method
    density: float
    lrs: tuple[int, ...]
    seeds: int
    refined: bool = False

    @property
    def name(self) -> str:
        return f"{self.method.name} at {self.density:g}"


def jobs(preset: Preset) -> Iterator[Job]:
    """All of them, the most important first."""
    first, *others = preset.densities
    wanted = preset.only
    for method in methods():
        if not wanted or method.name in wanted:
            again = method.group == "headline" or method.name in AGAIN
            seeds = preset.seeds if again else 1
            yield Job(method, first, method.lrs, seeds, preset.refined)
    for density in others:
        for method in methods():
            if method.group == "headline" and method.name not in AT_ONE_BUDGET:
                yield Job(method, density, method.later, 1)


BY_SCALE = "learning rates by scale"
AGAIN = (BY_SCALE,)
"""Candidates that were better with the first seed: the second one decides."""

LORA_16, FULL = "LoRA, 16 bits", "full fine-tuning"
AT_ONE_BUDGET = (FULL, LORA_16)
LOW, MIDDLE, HIGH = (-9, -8, -7, -6), (-8, -7, -6, -5), (-7, -6, -5, -4)
AROUND = (-7, -6, -5)


def methods() -> Iterator[Method]:
    """All rows of the tables."""

    def headline(name: str, build: Build, lrs: tuple[int, ...], form: str = NF4) -> Method:
        later = MIDDLE if name in (GRADIENT, RS_LORA) else HIGH
        return Method(name, "headline", form, build, lrs, later)

    yield headline(PRINCIPAL, leanlift(NF4), MIDDLE)
    yield headline(QLORA, lora(NF4), MIDDLE)
    yield headline(RANDOM, leanlift(NF4, selector="random"), HIGH)
    yield headline("leanlift magnitude, NF4", leanlift(NF4, selector="magnitude"), MIDDLE)
    yield headline(GRADIENT, leanlift(NF4, selector="gradient"), MIDDLE)
    yield headline(RS_LORA, lora(NF4, use_rslora=True), LOW)
    yield headline(SHIRA, shira(NF4), HIGH)
    yield headline("Super-Tuning (PEFT), 16 bits", super_tuning(BITS_16), MIDDLE, BITS_16)
    yield headline(PRINCIPAL_16, leanlift(BITS_16), MIDDLE, BITS_16)
    yield headline(LORA_16, lora(BITS_16), MIDDLE, BITS_16)
    yield headline(FULL, full, (-10, -9, -8, -7), BITS_32)
    for name, choose in (
        ("principal x gradient", each(times_gradient)),
        ("off-principal", off_principal),
        ("gradient alone (squares)", each(gradient_alone)),
        ("budgets by gradient", by_gradient),
        ("blocks of 4 x 4", blocks(4)),
        ("blocks of 16 x 16", blocks(16)),
        ("whole rows", rows),
        ("from the 16-bit weights", from_original),
    ):
        yield Method(name, "candidate", NF4, chosen(choose), AROUND)
    by_scale = chosen(each(principal), scaled=True)
    yield Method(BY_SCALE, "candidate", NF4, by_scale, AROUND)
    for R in (16, 128):
        yield Method(f"R = {R}", "variant", NF4, leanlift(NF4, approx_rank=R), AROUND)
    refreshed = leanlift(NF4, refresh_interval=10)
    yield Method("refresh every 10", "variant", NF4, refreshed, AROUND)
