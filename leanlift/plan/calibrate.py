"""A card's figures, measured in less than a second in the place of those of its sheet.

Two products show its rate, a copy in its memory and one over the bus the bandwidths. Each is done
once to warm up and then a few times between two looks at the clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from leanlift.errors import UserError
from leanlift.plan.cards import Card, card_named

TIMES = 4
SIDES = ((2048, 4096, 4096), (2048, 4096, 11008))
"""Tokens and both sides of two products as a 7B model has them."""

COPIED = 256 * 2**20
OVER_BUS = 128 * 2**20


def detected(clock: Callable[[], float] = time.perf_counter) -> Card | None:
    """This machine's card with measured figures; None: there is none."""
    if not torch.cuda.is_available():
        return None
    device = torch.device("cuda", torch.cuda.current_device())
    found = torch.cuda.get_device_properties(device)
    name = found.name.removeprefix("NVIDIA ").removeprefix("GeForce ")
    gib = round(found.total_memory / 2**30)
    try:
        card = replace(card_named(name), name=name, gib=gib)
    except UserError:
        card = Card(name, gib, 1.0, 1.0, 1.0)
    try:
        return calibrated(card, device, clock)
    except RuntimeError:  # no memory for it: another process has the card
        return card if card.flops > 1 else None


def calibrated(
    card: Card, device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> Card:
    """The card with what it reaches on this machine.

    Args:
        card: what is known of it.
        device: where it is.
        clock: seconds.
    """
    pinned = device.type == "cuda"
    half = torch.float16 if not pinned or not torch.cuda.is_bf16_supported() else torch.bfloat16
    seconds, flop = 0.0, 0
    for tokens, n, m in SIDES:
        x = torch.zeros(tokens, n, dtype=half, device=device)
        w = torch.zeros(m, n, dtype=half, device=device)
        seconds += _seconds(lambda x=x, w=w: x @ w.T, device, clock)  # type: ignore[misc]
        flop += 2 * tokens * n * m
    here = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    there = torch.empty_like(here)
    moved = _seconds(lambda: there.copy_(here), device, clock)
    host = torch.zeros(OVER_BUS, dtype=torch.uint8, pin_memory=pinned)
    brought = _seconds(lambda: here[:OVER_BUS].copy_(host, non_blocking=True), device, clock)
    return replace(
        card,
        flops=flop / seconds,
        bandwidth=2 * COPIED / moved,  # read and written
        bus=OVER_BUS / brought,
        measured=True,
    )


def _seconds(work: Callable[[], object], device: torch.device, clock: Callable[[], float]) -> float:
    """Of one time."""
    work()
    _wait(device)
    begun = clock()
    for _ in range(TIMES):
        work()
    _wait(device)
    return max(1e-9, (clock() - begun) / TIMES)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
