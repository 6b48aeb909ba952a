"""What settings need and how long a step of theirs takes, by card: as they are, with each change
more that is worth it and leaves what is trained, and as a search for each card chooses them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from leanlift.errors import UserError
from leanlift.plan import Known, MemoryPlan
from leanlift.plan.cards import Card
from leanlift.plan.time import StepTime, step_time
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.changes import Change, Settings, further_changes
from leanlift.training.fit import LEAST_GAIN, Fit, fit
from leanlift.training.plan import plan_of


@dataclass(frozen=True)
class Setting:
    """Settings and what came of planning them.

    Attributes:
        added: what was changed beside the settings of the lines before; None: the first.
        keys: all that was changed, as it stands in a file.
        plan: theirs.
    """

    added: Change | None
    keys: dict[str, object]
    plan: MemoryPlan

    def time(self, card: Card, gib: float) -> StepTime | None:
        """Of a step on a card of `gib` GiB; None: it does not fit."""
        return _time(self.plan, card) if self.plan.fits(gib) else None


@dataclass(frozen=True)
class ByCard:
    """The table.

    Attributes:
        cards: the size in GiB that counts, and the card whose times are modelled.
        settings: a line each, each with one change more than the one before.
        fitted: by size, what a search for the card chose; None: nothing fits.
    """

    cards: dict[float, Card]
    settings: list[Setting]
    fitted: dict[float, Fit | None]

    def fitted_time(self, gib: float) -> StepTime | None:
        """Of a step with what a search for the card chose; None: nothing fits."""
        found = self.fitted[gib]
        return None if found is None else _time(found.plan, self.cards[gib])


def by_card(
    args: RunArguments,
    sft: LiftSFTConfig,
    cards: dict[float, Card],
    say: Callable[[str], None] = lambda line: None,
    asked: Collection[str] = (),
) -> ByCard:
    """Plan the settings as they are, with one change more a line, and fitted to each card.

    Args:
        args, sft: the settings.
        cards: by size in GiB.
        say: is told what is being tried.
        asked: keys that the user has set, which no time is bought with.

    Raises:
        UserError: a model that cannot be planned for.
    """
    lines = list(with_changes(args, sft, say))
    fitted = {gib: _fitted(args, sft, gib, card, say, asked) for gib, card in cards.items()}
    return ByCard(cards, lines, fitted)


def with_changes(
    args: RunArguments, sft: LiftSFTConfig, say: Callable[[str], None] = lambda line: None
) -> Iterator[Setting]:
    """The settings as they are, then with one change more at a time, each that is worth it; what is
    not asked for is not planned. The arguments are those of `by_card`."""
    known: Known = {}
    settings: Settings = (args, sft)
    say("trying the settings as they are")
    last = Setting(None, {}, plan_of(*settings, True, None, known))
    yield last
    for change in further_changes(args, sft):
        if not change.possible(settings):
            continue
        say(f"trying {change.named}")
        try:
            plan = plan_of(*change(settings), True, None, known)
        except UserError:  # a change that this model cannot have
            continue
        if last.plan.needed - plan.needed >= LEAST_GAIN * last.plan.needed:
            settings = change(settings)
            last = Setting(change, {**last.keys, **change.keys}, plan)
            yield last


def _fitted(
    args: RunArguments,
    sft: LiftSFTConfig,
    gib: float,
    card: Card,
    say: Callable[[str], None],
    asked: Collection[str],
) -> Fit | None:
    def told(line: str) -> None:
        say(f"{gib:g} GB: {line}")

    try:
        return fit(args, sft, gib, True, told, card=card, asked=asked)
    except UserError:
        return None


def _time(plan: MemoryPlan, card: Card) -> StepTime:
    assert plan.work is not None
    return step_time(plan.work, card)
