"""The longest rows that a card has room for, with settings as they are and with each change more.

What a step needs grows with the tokens of a row, so the longest one that fits is looked for where a
straight line between what is known has it; plans of one setting serve all cards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from leanlift.errors import UserError
from leanlift.plan import Known, MemoryPlan
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.changes import Change, Settings, further_changes
from leanlift.training.plan import plan_of

UNIT = 256
"""Lengths are multiples of so many tokens."""

MOST = 2**20
"""Tokens beyond which nothing is looked for."""


@dataclass(frozen=True)
class Longest:
    """The longest rows with some settings.

    Attributes:
        added: what was changed beside the settings of the lines before; None: the first.
        keys: all that was changed, as it stands in a file.
        tokens: by the size of a card in GiB, the longest rows that fit; 0: none do.
    """

    added: Change | None
    keys: dict[str, object]
    tokens: dict[float, int]


def longest_rows(
    args: RunArguments,
    sft: LiftSFTConfig,
    cards: Sequence[float],
    cuda: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> list[Longest]:
    """The longest rows that fit each card: with the settings as they are, then with one change more
    a line, in the order in which a search for a card makes them.

    Args:
        args, sft: the settings; `max_length` does not matter.
        cards: their sizes in GiB.
        cuda: whether the run is on one.
        say: is told what is being tried.

    Raises:
        UserError: a method whose rows are no texts of `max_length` tokens.
    """
    if not hasattr(sft, "max_length"):
        raise UserError(f"rows of method={args.method} have no max_length: plan them by length.")
    settings: Settings = (args, sft)
    first = _Search(settings, cuda, say)
    lines = [Longest(None, {}, {gib: first.longest(gib) for gib in cards})]
    for change in further_changes(args, sft, cuda):
        if not change.possible(settings):
            continue
        search = _Search(change(settings), cuda, say)
        try:
            tokens = {gib: search.longest(gib) for gib in cards}
        except UserError:  # a change that this model cannot have
            continue
        settings = search.settings
        lines.append(Longest(change, {**lines[-1].keys, **change.keys}, tokens))
    return lines


class _Search:
    """Plans of one model and setting, by the length of rows."""

    def __init__(self, settings: Settings, cuda: bool, say: Callable[[str], None]) -> None:
        self.settings, self.cuda, self.say = settings, cuda, say
        self.known: Known = {}
        self.needed: dict[int, int] = {}

    def longest(self, gib: float) -> int:
        """The longest rows whose plan fits a card, a multiple of UNIT."""
        card = int(gib * 2**30)
        if self._of(UNIT) > card:
            return 0
        while True:
            low = max(tokens for tokens, needed in self.needed.items() if needed <= card)
            above = [tokens for tokens, needed in self.needed.items() if needed > card]
            if low >= MOST:
                return MOST
            if above and min(above) - low <= UNIT:
                return low
            self._of(self._guess(card, low, min(above, default=None)))

    def _guess(self, card: int, low: int, high: int | None) -> int:
        """Where a line through two known lengths meets the card; between what fits and what does
        not, and no more than four times what does."""
        one, other = (low, high) if high is not None else self._last_two()
        rise = (self.needed[other] - self.needed[one]) / (other - one) if other != one else 0
        there = low + int((card - self.needed[low]) / rise) if rise > 0 else 4 * low
        last = min(4 * low, MOST) if high is None else high - UNIT
        return max(low + UNIT, min(there // UNIT * UNIT, last))

    def _last_two(self) -> tuple[int, int]:
        """The two longest of the lengths that were planned."""
        longest = sorted(self.needed)[-2:]
        return longest[0], longest[-1]

    def _of(self, tokens: int) -> int:
        if tokens not in self.needed:
            self.say(f"trying rows of {tokens:,} tokens")
            args, sft = Change({"max_length": tokens}, "")(self.settings)
            plan: MemoryPlan = plan_of(args, sft, self.cuda, None, self.known)
            self.needed[tokens] = plan.needed
        return self.needed[tokens]
