"""Numbers, bars and tables as a person reads them."""

from __future__ import annotations

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leanlift.format import bar, console, count, duration, gib, loss, share, size, sparkline, table


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (count(512), "512"),
        (count(999_999), "1.00 M"),
        (count(3_250_000), "3.25 M"),
        (count(6.74e9), "6.74 B"),
        (size(812), "812 B"),
        (size(3.42 * 2**20), "3.42 MiB"),
        (size(13.9 * 2**30), "13.9 GiB"),
        (size(None), "–"),
        (gib(3.112 * 2**30), "3.11"),
        (gib(0), "0"),
        (share(0.05), "5 %"),
        (share(0.0042), "0.42 %"),
        (share(1, 100_000), "<0.01 %"),
        (share(1, 0), "–"),
        (duration(0.43), "0.4 s"),
        (duration(59.7), "1 min"),
        (duration(200), "3 min 20 s"),
        (duration(7500), "2 h 5 min"),
        (duration(280_000), "3 d 6 h"),
        (duration(None), "–"),
        (loss(2.3149), "2.31"),
        (loss(0.0412), "0.0412"),
        (loss(math.nan), "–"),
    ],
)
def test_numbers_are_short_and_have_a_unit(shown: str, expected: str) -> None:
    assert shown == expected


@given(st.floats(min_value=1e-3, max_value=1e15))
def test_decimals_stop_at_three_digits(number: float) -> None:
    for shown in (count(number), size(number), loss(number)):
        whole, _, decimals = shown.split()[0].replace(",", "").partition(".")
        digits = (whole + decimals).lstrip("0")
        assert not decimals or len(digits) <= 3, shown


def test_a_bar_is_as_long_as_its_share() -> None:
    assert bar(1, 2, 10) == "█████"
    assert bar(3, 16, 2) == "▍"
    assert bar(1e-9, 1, 10) == "▏"
    assert bar(0, 1, 10) == bar(1, 0, 10) == ""
    assert bar(5, 1, 3) == "███"


def test_a_sparkline_goes_down_with_a_loss_and_leaves_a_gap_for_nan() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, math.nan, 1.0]) == "█ ▁"
    assert sparkline([3, 3]) == "▁▁"
    assert sparkline([]) == sparkline([math.nan]) == ""
    assert len(sparkline(list(range(1000)), 30)) == 30


def test_a_table_fits_eighty_columns_and_cuts_the_first() -> None:
    lines = table([["a very long name " * 9, 3.11], ["values", 0.6]], ["what", "GiB"])
    assert max(map(len, lines)) == 80
    assert lines[2].startswith("a very long name ")
    assert lines[2].endswith("…  3.11")
    assert lines[3].endswith(" 0.6")
    assert lines[0].startswith("what ")


def test_a_console_that_is_no_terminal_has_eighty_columns_and_no_colour() -> None:
    file = io.StringIO()
    console(file).print("[bold]not markup[/bold]", style="red")
    assert file.getvalue() == "[bold]not markup[/bold]\n"
