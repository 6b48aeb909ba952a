"""A step through many like blocks, known from a step through few of them.

The blocks of a transformer repeat: every one alike, or in a pattern of a few kinds. So the fake
step runs through the first few alone, and what one more period of them adds is added as often as it
is missing. That is no estimate. A step is cut into laps at every block, forwards and backwards; a
lap has a peak over its start and leaves so many bytes more or less at its end. Where the last two
periods that were run have the same laps, every further one has them too, and the laps of the whole
step follow, one after the other.

Blocks count as alike when everything a block is made of is: kinds of modules, shapes, dtypes,
trained entries, plain settings, all but its number. Where some are recomputed in the backward pass
and some are not, each of the two stretches is run in part. Where blocks are not alike, or two
periods differ, the whole model is run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor, nn

from leanlift.measure.live import LiveBytes
from leanlift.model.blocks import block_lists

Mark = tuple[str, int]
NUMBERED = ("idx", "index", "layer_id", "layer_number", "layer_num")
"""Parts of names under which a block keeps its own number."""

RECOMPUTED = "gradient_checkpointing"
"""Where a block keeps whether it is recomputed; what it is made of is the same."""


@dataclass(frozen=True)
class Lap:
    """Between two marks of a step: the most bytes alive, and those alive at its end."""

    mark: Mark
    peak: int
    end: int


@dataclass(frozen=True)
class Stretch:
    """Blocks next to each other that repeat, and how to run them in part.

    Attributes:
        start: of the blocks that are run, the first one of these.
        kept: how many of these are run, the first ones.
        period: after so many, the kinds repeat.
        times: periods that are left out.
    """

    start: int
    kept: int
    period: int
    times: int

    @property
    def before(self) -> range:
        """The last period but one of those that are run."""
        end = self.start + self.kept
        return range(end - 2 * self.period, end - self.period)

    @property
    def last(self) -> range:
        """The last period that is run."""
        end = self.start + self.kept
        return range(end - self.period, end)


@dataclass(frozen=True)
class Repetition:
    """How to run a model's blocks in part.

    Attributes:
        path: of the list of blocks.
        run: the blocks that are run.
        stretches: those of which some are left out.
    """

    path: str
    run: tuple[int, ...]
    stretches: tuple[Stretch, ...]

    @property
    def kept(self) -> int:
        """How many blocks are run."""
        return len(self.run)


def repetition(model: nn.Module) -> Repetition | None:
    """How the blocks of a model repeat; None where all of them have to be run."""
    paths = block_lists(model)
    if len(paths) != 1:
        return None
    listed: Any = model.get_submodule(paths[0])
    blocks = list(listed)
    numbers: dict[Any, int] = {}
    kinds = [numbers.setdefault(_kind(block), len(numbers)) for block in blocks]
    run: list[int] = []
    stretches: list[Stretch] = []
    for blocks_alike in _recomputed_alike(blocks):
        kept, period, times = _in_part([kinds[number] for number in blocks_alike])
        if times:
            stretches.append(Stretch(len(run), kept, period, times))
        run += blocks_alike[:kept]
    if not stretches or [kinds[number] for number in run] != kinds[: len(run)]:
        return None  # a model may ask by a block's place which kind of it is there
    return Repetition(paths[0], tuple(run), tuple(stretches))


def first_block(model: nn.Module) -> Repetition | None:
    """The first block alone of those that repeat, for a pass of which blocks do not matter."""
    way = repetition(model)
    return None if way is None else Repetition(way.path, way.run[:1], ())


def _recomputed_alike(blocks: list[Any]) -> list[list[int]]:
    """Numbers of blocks next to each other that are recomputed, or are not."""
    flags = [bool(getattr(block, RECOMPUTED, False)) for block in blocks]
    alike = groupby(range(len(blocks)), key=flags.__getitem__)
    return [list(numbers) for _, numbers in alike]


def _in_part(kinds: list[int]) -> tuple[int, int, int]:
    """How many of the first blocks of these kinds are run, after how many the kinds repeat, and how
    many periods are left out."""
    found = [
        (kept, period, (len(kinds) - kept) // period)
        for period in range(1, len(kinds) // 2)
        if (kept := _kept(kinds, period)) < len(kinds)
    ]
    return min(found, default=(len(kinds), 1, 0))


def _kept(kinds: list[int], period: int) -> int:
    """How many of the first blocks show two whole periods behind the first ones, and end where the
    model's own last period ends. The first block of each kind may be unlike its kind: what all of
    them share, such as a mask, comes with it and goes with it; and what the first block was given
    is still alive in the second."""
    total = len(kinds)
    first = max((i + 1 for i in range(total - period) if kinds[i] != kinds[i + period]), default=0)
    least = max(first, period, 2) + 2 * period
    return least + (total - least) % period


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """All that a block is made of, but its number."""
    return tuple(
        (
            name,
            type(module),
            module.extra_repr(),
            tuple(_looks(tensor) for tensor in (*module._parameters.values(),)),
            tuple(_looks(tensor) for tensor in (*module._buffers.values(),)),
            tuple(sorted((key, repr(value)) for key, value in vars(module).items()
                         if _is_setting(key, value))),
        )
        for name, module in block.named_modules()
    )  # fmt: skip


def _looks(tensor: Tensor | None) -> Any:
    return None if tensor is None else (tuple(tensor.shape), tensor.dtype, tensor.requires_grad)


def _is_setting(key: str, value: Any) -> bool:
    plain = isinstance(value, (bool, int, float, str, tuple, type(None)))
    return plain and key != RECOMPUTED and not any(part in key for part in NUMBERED)


@contextmanager
def in_part(model: nn.Module, way: Repetition | None) -> Iterator[None]:
    """The model with the blocks of `run` alone."""
    if way is None:
        yield
        return
    whole: Any = model.get_submodule(way.path)
    try:
        model.set_submodule(way.path, nn.ModuleList([whole[number] for number in way.run]))
        yield
    finally:
        model.set_submodule(way.path, whole)


@dataclass
class Laps:
    """Marks the laps of a step while `LiveBytes` follows it.

    Attributes:
        live: what counts.
        done: the laps so far.
    """

    live: LiveBytes
    done: list[Lap] = field(default_factory=list)
    _backward: bool = False

    def mark(self, name: str, number: int = 0) -> None:
        """End a lap."""
        self.done.append(Lap((name, number), self.live.peak, self.live.current))
        self.live.peak = self.live.current

    @contextmanager
    def at_blocks(self, model: nn.Module, way: Repetition | None) -> Iterator[None]:
        """Mark the end of each block's forward and backward pass too. What a block gets back for
        its output ends the lap of the block behind it."""
        if way is None:
            yield
            return
        blocks: Any = model.get_submodule(way.path)

        def passed(number: int) -> Any:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                if self._backward:  # recomputed
                    return
                self.mark("forward", number)
                y = output if isinstance(output, Tensor) else output[0]
                if y.requires_grad:
                    y.register_hook(lambda grad: self.mark("backward", number + 1))

            return hook

        handles = [block.register_forward_hook(passed(i)) for i, block in enumerate(blocks)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def backward_pass(self) -> Iterator[None]:
        """What runs inside is the backward pass."""
        self._backward = True
        try:
            yield
        finally:
            self._backward = False
            self.mark("done")


def repeats(laps: list[Lap], way: Repetition) -> bool:
    """Whether the last two periods of every pass have the same laps."""
    for direction in ("forward", "backward"):
        costs: dict[int, list[tuple[int, int]]] = {}
        for lap, start in zip(laps, [0, *(lap.end for lap in laps)], strict=False):
            name, number = lap.mark
            if name == direction:
                costs.setdefault(number, []).append((lap.peak - start, lap.end - start))
        for stretch in way.stretches:
            for one, other in zip(stretch.before, stretch.last, strict=True):
                if one not in costs or costs[one] != costs.get(other):
                    return False
    return True


def whole_step(laps: list[Lap], way: Repetition | None) -> list[Lap]:
    """The laps of a step through all blocks, from those of a step through some of them."""
    if way is None:
        return laps
    again = {number: stretch for stretch in way.stretches for number in stretch.before}
    whole: list[Lap] = []
    period: list[Lap] = []  # peak over the start, and growth, of the laps to repeat
    start = 0
    for lap in laps:
        name, number = lap.mark
        cost = Lap(lap.mark, lap.peak - start, lap.end - start)
        start = lap.end
        _append(whole, cost)
        if name in ("forward", "backward") and number in again:
            stretch = again[number]
            period.append(cost)
            if number == stretch.before[-1 if name == "forward" else 0]:
                for each in period * stretch.times:
                    _append(whole, each)
                period = []
    return whole


def _append(whole: list[Lap], cost: Lap) -> None:
    start = whole[-1].end if whole else 0
    whole.append(Lap(cost.mark, start + cost.peak, start + cost.end))
