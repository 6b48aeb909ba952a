"""Choosing settings with which a run fits a card: first what is free, last what costs quality.

A change is taken only if it gains something worth its price: at least a hundredth of what is
needed. One that a model cannot have is left out, and said. What is ordered (the rows of a batch,
the density) is not walked through but bisected, and before anything is planned it is asked whether
the least settings could fit at all: their weights alone say so in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from leanlift.errors import UserError
from leanlift.format import parse_card, short_name, size
from leanlift.plan import MOMENTS, Batch, Known, MemoryPlan
from leanlift.plan.cards import Card
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.batches import Batches
from leanlift.training.changes import (
    Change,
    Settings,
    Taken,
    at_most,
    half_of,
    ordered_changes,
    shorter_rows,
)
from leanlift.training.faster import Bought, faster
from leanlift.training.plan import least_of, plan_of

__all__ = ["Fit", "fit", "parse_card", "useful_changes"]

LEAST_GAIN = 0.01
"""The share of what is needed that a change must save."""


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and the way there.

    Attributes:
        args, sft: the settings.
        plan: what they need.
        taken: the changes.
        bought: what was changed after that, for time.
    """

    args: RunArguments
    sft: LiftSFTConfig
    plan: MemoryPlan
    taken: tuple[Taken, ...]
    bought: tuple[Bought, ...] = ()

    @property
    def steps(self) -> tuple[str, ...]:
        """A line per change: what was changed, what it costs, what it brought."""
        return tuple(map(str, self.taken))


class _Search:
    """Plans of one base for one card.

    Args:
        gib: of the card.
        cuda: whether it is one.
        batches: how long rows are; None: as long as the settings allow.
        say: is told what is being tried.
        offered: the changes that there are to make, in order.
    """

    def __init__(
        self,
        gib: float,
        cuda: bool,
        batches: Batches | None,
        say: Callable[[str], None],
        offered: Iterable[tuple[Change, ...]] = (),
    ) -> None:
        self.gib, self.cuda, self.batches, self.say = gib, cuda, batches, say
        self.offered = list(offered)
        self.known: Known = {}
        self.left_out: list[str] = []

    def plan(self, settings: Settings, trying: str) -> MemoryPlan:
        self.say(f"trying {trying}")
        return plan_of(*settings, self.cuda, _smaller(self.batches, settings[1]), self.known)

    def leave_out(self, change: Change, error: UserError) -> str:
        """A change cannot be planned for this model: remember it; what is said of it."""
        self.left_out.append(change.named)
        return f"{change.named} was left out: {error}"

    def fits(self, plan: MemoryPlan) -> bool:
        return plan.fits(self.gib)


def fit(
    args: RunArguments,
    sft: LiftSFTConfig,
    gib: float,
    cuda: bool = True,
    say: Callable[[str], None] = lambda line: None,
    batches: Batches | None = None,
    card: Card | None = None,
    asked: Collection[str] = (),
) -> Fit:
    """Change settings in a fixed order until the plan fits a card of `gib` GiB.

    Args:
        args, sft: the settings as they are.
        gib: of the card.
        cuda: whether the run is on a GPU.
        say: is told what is being tried, a line each.
        batches: how long rows are; None: as long as `max_length` allows.
        card: whose time what is left buys back (`training/faster.py`); None: nothing is bought.
        asked: keys that the user has set, which no time is bought with.

    Raises:
        UserError: nothing fits; says how much is missing.
    """
    settings = args, sft
    search = _Search(gib, cuda, batches, say, ordered_changes(args, sft, cuda))
    _refuse_what_cannot_fit(settings, search)
    plan = search.plan(settings, "the settings as they are")
    taken: list[Taken] = []
    said: list[str] = []
    for choices in search.offered:
        if search.fits(plan):
            break
        elsewhere = plan.peak_phase != "evaluate"
        if elsewhere and "per_device_eval_batch_size" in choices[0].keys:
            continue
        if not choices[0].possible(settings):
            continue
        try:
            change, changed = _best(choices, settings, plan, search)
        except UserError as error:
            said.append(search.leave_out(choices[-1], error))
            continue
        if plan.needed - changed.needed >= LEAST_GAIN * plan.needed or search.fits(changed):
            taken.append(Taken(change, plan.needed, changed.needed))
            settings, plan = change(settings), changed
    if not search.fits(plan):
        _refuse(args, search, plan.needed)
    if card is None:
        return Fit(*settings, _saying(said, plan), tuple(taken))
    made = faster((args, sft), tuple(taken), plan, gib, card, search.plan, asked)
    return Fit(*made.settings, _saying(said, made.plan), made.taken, made.bought)


def _saying(more: list[str], plan: MemoryPlan) -> MemoryPlan:
    return replace(plan, notes=[*plan.notes, *more])


def useful_changes(
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: MemoryPlan,
    cuda: bool = True,
    most: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> list[Taken]:
    """The changes that save most, each on its own, planned: the largest first, and last what costs
    quality.

    Args:
        args, sft, cuda: what `plan` was made for.
        plan: what is needed now.
        most: how many.
        say: is told what is being tried.
    """
    search = _Search(0.0, cuda, None, say)
    choices = [half_of(group, args) for group in ordered_changes(args, sft, cuda)]
    choices += shorter_rows(sft)
    choices = [change for change in choices if change.possible((args, sft))]
    promising = sorted(choices, key=lambda change: -at_most(change, plan))[: most + 1]
    found = []
    for change in promising:
        try:
            changed = search.plan(change((args, sft)), change.named)
        except UserError:  # one that this model cannot have
            continue
        found.append(Taken(change, plan.needed, changed.needed))
    worth = [taken for taken in found if taken.saved >= LEAST_GAIN * plan.needed]
    return sorted(worth, key=lambda taken: ("quality" in taken.change.cost, -taken.saved))[:most]


# --- the search -------------------------------------------------------------------------------


NEARLY, CLEARLY = 0.85, 1.05
"""Share of a card from which the least settings are planned before any others, and the share that
they must need to be refused by that: a change may cost a small model more than it saves."""


def _refuse_what_cannot_fit(settings: Settings, search: _Search) -> None:
    """Ask whether the weights of the least settings fit, and all of a step where they nearly fill
    the card.

    Raises:
        UserError: they do not.
    """
    search.say("asking whether the least settings fit")
    (settings, least, moment), card = _least(settings, search), search.gib * 2**30
    if least > card:
        _refuse(settings[0], search, least, MOMENTS[moment])
    if least > NEARLY * card:
        try:
            plan = search.plan(settings, "the least settings")
        except UserError:  # which change it is is found out as they are made
            return
        if plan.needed > CLEARLY * card:
            _refuse(settings[0], search, plan.needed)


def _least(settings: Settings, search: _Search) -> tuple[Settings, int, str]:
    """The settings with all changes that the model can have, and what they need, as `least_of` has
    it. All at once, which is the rule; one by one where that cannot be."""
    lean = settings
    for choices in search.offered:
        if choices[-1].possible(lean):
            lean = choices[-1](lean)
    with suppress(UserError):
        return lean, *least_of(*lean, search.cuda)
    found = least_of(*settings, search.cuda)
    for choices in search.offered:
        if choices[-1].possible(settings):
            try:
                found = least_of(*choices[-1](settings), search.cuda)
            except UserError as error:
                search.leave_out(choices[-1], error)
            else:
                settings = choices[-1](settings)
    return settings, *found


def _refuse(args: RunArguments, search: _Search, needed: int, how: str = "") -> None:
    left = ", ".join(dict.fromkeys(search.left_out))
    raise UserError(
        f"{short_name(args.model_name_or_path)} does not fit {search.gib:g} GiB: the least setting "
        f"{left and f'(without {left}, which it cannot have) '}"
        f"needs {size(needed)}{how and ' ' + how}, {size(needed - search.gib * 2**30)} more than "
        "there is; take a smaller base" + ("." if how else ", or shorten max_length.")
    )


def _best(
    choices: tuple[Change, ...], settings: Settings, plan: MemoryPlan, search: _Search
) -> tuple[Change, MemoryPlan]:
    """The first of ordered choices that fits, looked for where a straight line between what is
    known has it; the last one where none does.

    Args:
        choices: each needs less than the one before.
        settings: without any of them.
        plan: of those, which does not fit.
        search: makes the plans.
    """
    low, high = -1, len(choices) - 1
    above, found = plan, (choices[-1], search.plan(choices[-1](settings), choices[-1].named))
    if not search.fits(found[1]):
        return found
    while high - low > 1:
        over, span = above.needed - search.gib * 2**30, above.needed - found[1].needed
        guess = low + math.ceil((high - low) * over / max(1, span))
        middle = min(max(guess, low + 1), high - 1)
        made = search.plan(choices[middle](settings), choices[middle].named)
        if search.fits(made):
            high, found = middle, (choices[middle], made)
        else:
            low, above = middle, made
    return found


def _smaller(batches: Batches | None, sft: LiftSFTConfig) -> Batches | None:
    """Batches of known lengths with as many rows as the settings now say."""
    if batches is None:
        return None
    train = _of_rows(
        batches.train, sft.per_device_train_batch_size, getattr(sft, "max_length", None)
    )
    evaluated = _of_rows(
        batches.eval, sft.per_device_eval_batch_size, getattr(sft, "max_length", None)
    )
    return Batches(train, evaluated, batches.images)


def _of_rows(batch: Batch | None, rows: int, longest: int | None) -> Batch | None:
    if batch is None:
        return None
    tokens = min(batch.tokens, longest or batch.tokens) if batch.seen is None else batch.tokens
    if (rows, tokens) == (batch.rows, batch.tokens):
        return batch
    trained = None if batch.trained is None else min(batch.trained, rows * tokens)
    return Batch(rows, tokens, trained, batch.padded and rows > 1, batch.seen)
