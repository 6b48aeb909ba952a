"""Cards whose step times are modelled, with the three figures that decide them.

From NVIDIA's own sheets: the appendices of the architecture whitepapers (GA102, Ada, RTX Blackwell)
and of the data sheets (A100, H100, L4, T4). FLOP/s are those of dense products of 16-bit numbers
that are summed up in 32 bits. GeForce cards of which a sheet says only the rate of plain fp32 have
twice that, as those have of which both are said. The bus is PCIe: generation and lanes of the card,
one way, after its line code.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from leanlift.errors import UserError

LANE = {3: 0.985e9, 4: 1.969e9, 5: 3.938e9}
"""Bytes a second of a lane of PCIe, by generation."""


@dataclass(frozen=True)
class Card:
    """A card.

    Attributes:
        name: as NVIDIA writes it.
        gib: memory.
        flops: products of 16-bit numbers, FLOP/s.
        bandwidth: of its memory, bytes/s.
        bus: to the host, bytes/s one way.
        measured: whether the figures were measured here, and are not peaks of a sheet.
    """

    name: str
    gib: int
    flops: float
    bandwidth: float
    bus: float
    measured: bool = False


def _card(name: str, gib: int, tera: float, giga: float, pcie: int, lanes: int = 16) -> Card:
    return Card(name, gib, tera * 1e12, giga * 1e9, LANE[pcie] * lanes)


CARDS: tuple[Card, ...] = (
    _card("RTX 3060", 12, 25.5, 360, 4),
    _card("RTX 4070", 12, 58.3, 504, 4),
    _card("T4", 16, 65, 320, 3),
    _card("RTX 4060 Ti", 16, 44.1, 288, 4, 8),
    _card("RTX 4080", 16, 97.5, 717, 4),
    _card("RTX 3090", 24, 71, 936, 4),
    _card("RTX 4090", 24, 165.2, 1008, 4),
    _card("L4", 24, 121, 300, 4),
    _card("RTX 5090", 32, 209.5, 1792, 5),
    _card("A100 40GB", 40, 312, 1555, 4),
    _card("A100 80GB", 80, 312, 2039, 4),
    _card("H100 SXM", 80, 989.4, 3350, 5),
)
"""By size of their memory."""

STANDS_FOR = {8: "RTX 3060", 12: "RTX 3060", 16: "RTX 4060 Ti", 24: "RTX 3090", 32: "RTX 5090"}
"""Of which card a size is, where only that is known: the slowest consumer card of it that is here;
for one of less memory, of the next size."""


OTHERS = "ti|super|laptop|mobile|max|d"
"""What makes another card of one, behind its name."""


def card_named(name: str) -> Card:
    """A card by its name, however it is spaced: "rtx4090", "NVIDIA GeForce RTX 4090"; not one whose
    name goes on with what makes it another (an RTX 4070 Ti, an L40S).

    Raises:
        UserError: it is none of these.
    """
    found = [card for card in CARDS if _names(card.name, name)]
    if not found and any(each.isdigit() for each in name):  # a part of one, as "A100" or "4090"
        found = [card for card in CARDS if _names(name, card.name)]
    if not found:
        raise UserError(
            f"expected card as one of {', '.join(card.name for card in CARDS)}; got {name!r:.60}."
        )
    return max(found, key=lambda card: (len(card.name), card.gib))


def card_of_size(gib: float) -> Card:
    """The card that stands for a size of memory: the slowest consumer card that has it, or the
    smallest one of a data centre."""
    for size, name in STANDS_FOR.items():
        if gib <= size:
            return card_named(name)
    return next((card for card in CARDS if card.gib >= gib), CARDS[-1])


def _names(name: str, text: str) -> bool:
    """Whether a name stands in a text, as whole words and with no word of `OTHERS` behind it."""
    words = r"[\s_-]*".join(re.findall("[a-z]+|[0-9]+", name.lower()))
    whole = rf"(?<![a-z0-9]){words}(?![a-z0-9])(?![\s_-]*(?:{OTHERS})\b)"
    return re.search(whole, text.lower()) is not None
