"""What is left on a card buys time back, once settings fit it, but for a reserve.

First what the search for the card has turned on is taken back where there is room for it by now: a
later change may have made it needless. What costs quality comes first, then whatever saves most
seconds for a byte. Then blocks keep their activations, as many as fit, weights that are made to
recompute a block serve its backward pass, MLPs take long rows in fewer pieces, and micro-batches
become larger. What the user has asked for stays. Seconds are modelled (`plan/time.py`); that the
result fits is planned, as for any other settings.

A larger micro-batch pads rows to the longest of more, which no model of shapes sees. It is taken
where rows are packed, or where it saves so much that padding hardly takes it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from leanlift.errors import UserError
from leanlift.format import share, size
from leanlift.layers.tiled_mlp import pieces
from leanlift.plan import MemoryPlan
from leanlift.plan.cards import Card
from leanlift.plan.time import StepTime, step_time
from leanlift.training.changes import Change, Settings, Taken

Plan = Callable[[Settings, str], MemoryPlan]
"""The plan of settings; is told what they are called."""

LEAST_SAVED, LEAST_PADDED = 0.01, 0.2
"""Shares of a step's time that larger pieces and a larger micro-batch must save, and the latter
where it pads rows."""

RESERVE = 0.05
"""Of a card, that is not spent on time: so far may what a step needs be above its plan (on an H100
it was 1 %, `benchmarks/gpu_proof`)."""

MIN_PIECES = 2
"""Of a row that MLPs take in pieces."""

ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")


@dataclass(frozen=True)
class Bought:
    """A change that takes bytes and saves time.

    Attributes:
        change: the settings.
        before, after: bytes that are needed, without it and with it.
        slower, faster: a step without it and with it, modelled.
    """

    change: Change
    before: int
    after: int
    slower: StepTime
    faster: StepTime

    @property
    def taken(self) -> int:
        """Bytes of the peak that it takes."""
        return self.after - self.before

    @property
    def saved(self) -> float:
        """Seconds of a step that it saves."""
        return self.slower.seconds - self.faster.seconds

    @property
    def saved_share(self) -> float:
        """Of the step's time that it saves."""
        return self.saved / self.slower.seconds

    @property
    def worth(self) -> float:
        """Seconds by byte."""
        return self.saved / max(1, self.taken)

    @property
    def why(self) -> str:
        """In words."""
        less = share(self.saved, self.slower.seconds)
        return f"takes {size(max(0, self.taken))}: {self.change.cost}, {less} less time (modelled)"


@dataclass(frozen=True)
class Faster:
    """Settings for which a card is used up.

    Attributes:
        settings, plan: as they are now.
        taken: what is left of the changes that were made to fit.
        bought: what was changed after that.
    """

    settings: Settings
    plan: MemoryPlan
    taken: tuple[Taken, ...]
    bought: tuple[Bought, ...]


def faster(
    start: Settings,
    taken: tuple[Taken, ...],
    plan: MemoryPlan,
    gib: float,
    card: Card,
    plan_of: Plan,
    asked: Collection[str] = (),
) -> Faster:
    """Buy time with what is left.

    Args:
        start: the settings before anything was changed.
        taken: the changes that were made, in order.
        plan: of the settings with them; it fits.
        gib: of the card.
        card: for whose times.
        plan_of: makes plans.
        asked: keys that the user has set.
    """
    buyer = _Buyer((1 - RESERVE) * gib, card, plan_of, asked)
    if plan.fits(buyer.gib):
        taken, plan = buyer.take_back(start, taken, plan)
    settings = _with(start, taken)
    assert settings is not None  # they were made before
    bought: list[Bought] = []
    if not plan.fits(buyer.gib):
        return Faster(settings, plan, taken, ())
    while (found := buyer.best(settings, plan)) is not None:
        change, plan = found
        settings = change.change(settings)
        bought.append(change)
    return Faster(settings, plan, taken, tuple(bought))


class _Buyer:
    def __init__(self, gib: float, card: Card, plan_of: Plan, asked: Collection[str]) -> None:
        self.gib, self.card, self.plan_of, self.asked = gib, card, plan_of, set(asked)
        self.done: set[str] = set()

    def time(self, plan: MemoryPlan) -> StepTime:
        assert plan.work is not None
        return step_time(plan.work, self.card)

    # --- what was turned on to fit -------------------------------------------------------

    def take_back(
        self, start: Settings, taken: tuple[Taken, ...], plan: MemoryPlan
    ) -> tuple[tuple[Taken, ...], MemoryPlan]:
        """The changes without those for which there is room, and the plan."""
        tried = [step for step in taken[:-1] if _costs(step)]  # without the last it did not fit
        while tried:
            found: list[tuple[float, Taken, MemoryPlan]] = []
            for step in tried:
                settings = _with(start, tuple(one for one in taken if one is not step))
                if settings is None:
                    continue
                try:
                    without = self.plan_of(settings, f"without {step.change.named}")
                except UserError:  # the rest cannot be had alone
                    continue
                if without.fits(self.gib):
                    saved = self.time(plan).seconds - self.time(without).seconds
                    worth = saved / max(1, without.needed - plan.needed)
                    found.append((math.inf if _of_quality(step) else worth, step, without))
            useful = [each for each in found if each[0] > 0]
            if not useful:
                break
            _, step, plan = max(useful, key=lambda each: each[0])
            taken = tuple(one for one in taken if one is not step)
            tried = [one for _, one, _ in found if one is not step]
        return taken, plan

    # --- what costs memory ---------------------------------------------------------------

    def best(self, settings: Settings, plan: MemoryPlan) -> tuple[Bought, MemoryPlan] | None:
        """What saves most for a byte, of what is left to buy; None: nothing more. How many blocks
        are kept takes several plans to know, so that comes when the rest is settled."""
        found: list[tuple[str, tuple[Bought, MemoryPlan]]] = []
        ways = {
            "rows": self._more_rows,
            "pieces": self._larger_pieces,
            "weights": self._reused_weights,
            "blocks": self._kept_blocks,
        }
        for name, buy in ways.items():
            if name == "blocks" and any(each != "rows" for each, _ in found):
                break
            bought = None if name in self.done else buy(settings, plan)
            if bought is None:
                self.done.add(name)
            else:
                found.append((name, bought))
        if not found:
            return None
        name, best = max(found, key=lambda each: each[1][0].worth)
        if name in ("weights", "blocks"):  # as much as there is room for
            self.done.add(name)
        return best

    def _more_rows(self, settings: Settings, plan: MemoryPlan) -> tuple[Bought, MemoryPlan] | None:
        """The next larger micro-batch with as many rows in a step, if it is worth it."""
        sft = settings[1]
        rows, times = (getattr(sft, key) for key in ROWS)
        if times == 1 or self.asked & set(ROWS):
            return None
        larger = next(n for n in range(rows + 1, rows * times + 1) if rows * times % n == 0)
        keys = dict(zip(ROWS, (larger, rows * times // larger), strict=True))
        packed = getattr(sft, "packing", False) or getattr(sft, "group_by_length", False)
        least = LEAST_SAVED if packed else LEAST_PADDED
        if self._made_again(plan) * (1 - rows / larger) < least:
            return None
        change = Change(keys, "the same batch in fewer pieces")
        bought = self._bought(change, settings, plan)
        return bought if bought and bought[0].saved_share >= least else None

    def _made_again(self, plan: MemoryPlan) -> float:
        """The share of a step's time that goes into bytes, and not into products: the most that
        fewer micro-batches could save, if all of it were weights."""
        time, still = self.time(plan), replace(self.card, bandwidth=math.inf, bus=math.inf)
        assert plan.work is not None
        return 1 - step_time(plan.work, still).seconds / time.seconds

    def _larger_pieces(
        self, settings: Settings, plan: MemoryPlan
    ) -> tuple[Bought, MemoryPlan] | None:
        """Half as many pieces of MLPs' long rows, two at least, whose weights are made half as
        often."""
        args, holds = settings[0], plan.holds_for
        tokens = holds["per_device_train_batch_size"] * holds["max_length"]
        now = len(pieces(tokens, args.mlp_tokens))
        if not args.tiled_mlp or "mlp_tokens" in self.asked or now <= MIN_PIECES:
            return None
        count = max(MIN_PIECES, now // 2)
        change = Change(
            {"mlp_tokens": math.ceil(tokens / count)}, f"MLPs in {count} pieces, not {now}"
        )
        bought = self._bought(change, settings, plan)
        return bought if bought and bought[0].saved_share >= LEAST_SAVED else None

    def _kept_blocks(
        self, settings: Settings, plan: MemoryPlan
    ) -> tuple[Bought, MemoryPlan] | None:
        """As many kept blocks as fit: looked for on a straight line, which their bytes follow where
        they make the peak."""
        sft, low = settings[1], settings[1].kept_blocks
        most = 0 if plan.work is None else plan.work.recomputable
        if not sft.gradient_checkpointing or "kept_blocks" in self.asked or most <= low:
            return None
        known: dict[int, MemoryPlan] = {low: plan}
        try:
            for count in (most, (low + most) // 2):
                known.setdefault(count, self._keeping(count, settings))
            while (number := _next(known, self.gib)) is not None:
                known[number] = self._keeping(number, settings)
        except UserError:  # a model whose blocks are not checkpointed one by one
            return None
        kept = max(count for count, each in known.items() if each.fits(self.gib))
        if kept == low:
            return None
        blocks = f"{kept} blocks are" if kept > 1 else "block is"
        change = Change({"kept_blocks": kept}, f"the last {blocks} not recomputed")
        found = known[kept]
        times = self.time(plan), self.time(found)
        return Bought(change, plan.needed, found.needed, *times), found

    def _reused_weights(
        self, settings: Settings, plan: MemoryPlan
    ) -> tuple[Bought, MemoryPlan] | None:
        """Weights that are made to recompute a block serve its backward pass too, where some are
        recomputed in the end."""
        sft, most = settings[1], 0 if plan.work is None else plan.work.recomputable
        fixed = "reuse_weights" in self.asked or sft.reuse_weights
        if fixed or not sft.gradient_checkpointing or sft.kept_blocks >= most:
            return None
        if "kept_blocks" not in self.asked and self._keeping(most, settings).fits(self.gib):
            return None
        change = Change({"reuse_weights": True}, "a block's weights are made twice, not thrice")
        bought = self._bought(change, settings, plan)
        return bought if bought and bought[0].saved > 0 else None

    def _keeping(self, count: int, settings: Settings) -> MemoryPlan:
        return self.plan_of(Change({"kept_blocks": count}, "")(settings), f"kept_blocks={count}")

    def _bought(
        self, change: Change, settings: Settings, plan: MemoryPlan
    ) -> tuple[Bought, MemoryPlan] | None:
        """A change, if it fits."""
        try:
            changed = self.plan_of(change(settings), change.named)
        except UserError:  # a change that this model cannot have
            return None
        if not changed.fits(self.gib):
            return None
        times = self.time(plan), self.time(changed)
        return Bought(change, plan.needed, changed.needed, *times), changed


def _next(known: dict[int, MemoryPlan], gib: float) -> int | None:
    """The number to plan next, between the largest that fits and the least that does not: where a
    line meets the card, through the two least that do not fit, where blocks make the peak; None:
    they are neighbours, or all fit."""
    card = gib * 2**30
    low = max(count for count, plan in known.items() if plan.fits(gib))
    above = sorted(count for count in known if count > low)
    if not above or above[0] - low == 1:
        return None
    high = above[0]
    one, other = (high, above[1]) if len(above) > 1 else (low, high)
    rise = (known[other].needed - known[one].needed) / (other - one)
    over = known[high].needed - card
    guess = high - math.ceil(over / rise) if rise > 0 else low + 1
    return min(max(guess, low + 1), high - 1)


def _with(start: Settings, taken: tuple[Taken, ...]) -> Settings | None:
    """The settings with these changes; None where one cannot be made without another."""
    settings = start
    for step in taken:
        if not step.change.possible(settings):
            return None
        try:
            settings = step.change(settings)
        except UserError:  # as of streamed state without a streamed base
            return None
    return settings


FREE = {"optim", "values_dtype", "per_device_eval_batch_size"}
"""What costs no time that is worth a plan, and no quality that was measured."""


def _costs(step: Taken) -> bool:
    return not FREE & step.change.keys.keys()


def _of_quality(step: Taken) -> bool:
    """Whether a change gives up something else than time."""
    return bool({"density", "optim_in_backward", "quantize_embeddings"} & step.change.keys.keys())
