"""How many rows of the values' gradient are formed at once, on a CPU and on cards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import make_lift, make_linear4bit

from leanlift.layers.gradient_rows import cache_of, cached_rows, gradient_rows

MIB = 2**20
CARDS = {  # second-level cache and multiprocessors
    "T4": (4 * MIB, 40),  # Turing's whitepaper, TU104
    "RTX 3060": (3 * MIB, 28),  # GA102's: 512 KiB for each 32 bits of the bus, of which it has 192
    "A100": (40 * MIB, 108),  # A100's
    "H100": (50 * MIB, 132),  # Hopper's, of the SXM5 card
    "RTX 4090": (72 * MIB, 128),  # Ada's
    "RTX 5090": (96 * MIB, 170),  # RTX Blackwell's
}


@pytest.mark.parametrize(
    ("card", "wide", "square"),
    [
        ("T4", 4096, 4096),  # what fits is no work for its multiprocessors
        ("RTX 3060", 4096, 4096),
        ("A100", 896, 2048),
        ("H100", 1024, 2048),
        ("RTX 4090", 1408, 4096),
        ("RTX 5090", 2048, 4096),
    ],
)
def test_rows_of_a_product_that_stays_in_the_cache(card: str, wide: int, square: int) -> None:
    """Of 4096 x 11008 and of 4096 x 4096, in 16 bits."""
    cache, processors = CARDS[card]
    assert cached_rows(4096, 11008, 2, cache, processors) == wide
    assert cached_rows(4096, 4096, 2, cache, processors) == square
    for rows, n in ((wide, 11008), (square, 4096)):
        assert rows == 4096 or rows * n * 2 <= cache // 2
    assert cached_rows(96, 11008, 2, cache, processors) == 96  # no more than there are


def on_card(
    monkeypatch: pytest.MonkeyPatch, card: str | None, tokens: int, dtype: torch.dtype
) -> Any:
    """An input of a layer as on a card; None: on one whose driver says nothing."""
    cache, processors = CARDS.get(card or "", (0, 0))
    said = {"L2_cache_size": cache, "multi_processor_count": processors} if card else {}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**said))
    cache_of.cache_clear()
    size = dtype.itemsize
    return SimpleNamespace(
        device=torch.device("cuda", 0), shape=(tokens, 11008), element_size=lambda: size
    )


@pytest.fixture(autouse=True)
def forgotten() -> Any:
    """No made-up card stays for other tests."""
    yield
    cache_of.cache_clear()


def test_pieces_are_worth_a_launch_or_all_rows_are_formed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rows(card: str | None, tokens: int, dtype: torch.dtype = torch.bfloat16) -> int:
        return gradient_rows(4096, 11008, on_card(monkeypatch, card, tokens, dtype))

    assert rows("RTX 4090", 2048) == 1408
    assert rows("RTX 4090", 8192, torch.float32) == 768  # twice the bytes
    assert rows("RTX 4090", 512) == 4096  # launches would take longer than products
    assert rows("H100", 2048) == 4096
    assert rows("H100", 4096) == 1024
    assert rows(None, 2048) == 4096


@pytest.mark.parametrize("lists_rows", [False, True])
def test_a_layer_forms_so_many_rows_at_once(
    monkeypatch: pytest.MonkeyPatch, lists_rows: bool
) -> None:
    lift = make_lift(make_linear4bit(320, 48))
    x, grad_y = torch.randn(5, 48), torch.randn(5, 320)
    whole = lift.values_gradient(x, grad_y)
    monkeypatch.setattr("leanlift.layers.lift.gradient_rows", lambda *_: 128)
    ops = lift.workspace.choose(torch.device("cpu"))
    formed, product = [], ops.sampled_product

    def counted(left: torch.Tensor, *rest: Any) -> None:
        formed.append(left.shape[1])
        product(left, *rest)

    monkeypatch.setattr(ops, "sampled_product", counted)
    monkeypatch.setattr(ops, "lists_rows", lists_rows)
    assert torch.equal(lift.values_gradient(x, grad_y), whole)
    assert formed == ([320] if lists_rows else [128, 128, 64])
