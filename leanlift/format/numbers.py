"""Numbers as a person reads them, at most three digits and a unit; and as a person gives them."""

from __future__ import annotations

import math

from leanlift.errors import UserError

THOUSANDS = ("", " k", " M", " B", " T")
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")
LONG = 1e15
"""From where on a number is written with its power of ten: a perplexity may have 300 digits."""


def count(number: float) -> str:
    """How many: "512", "1.23 k", "3.25 M", "6.74 B"."""
    return _scaled(number, 1000, THOUSANDS)


def size(nbytes: float | None) -> str:
    """Bytes: "812 B", "3.42 MiB", "13.9 GiB"; "–" for None."""
    if nbytes is None:
        return "–"
    return _scaled(nbytes, 1024, tuple(f" {unit}" for unit in SIZES))


def gib(nbytes: float | None) -> str:
    """Bytes as GiB alone, for a column that says so: "0.04", "3.11", "13.9"; "–" for None."""
    return "–" if nbytes is None else digits(nbytes / 2**30, least=2)


def share(part: float, whole: float = 1.0) -> str:
    """A share of a whole: "5 %", "0.42 %", "<0.01 %"; "–" where there is no whole."""
    if not whole or not math.isfinite(part / whole):
        return "–"
    percent = 100 * part / whole
    return "<0.01 %" if 0 < percent < 0.005 else f"{digits(percent, least=2)} %"


def duration(seconds: float | None) -> str:
    """A time: "0.4 s", "42 s", "3 min 20 s", "2 h 5 min", "3 d 4 h"; "–" for None."""
    if seconds is None or not math.isfinite(seconds):
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, step in (("d", "h", 3600), ("h", "min", 60), ("min", "s", 1)):
        per = {"d": 24, "h": 60, "min": 60}[large]
        rest = round(seconds / step)
        if rest >= per:
            first, second = divmod(rest, per)
            return f"{first} {large}" + (f" {second} {small}" if second else "")
    return f"{whole} s"


def loss(value: float | None) -> str:
    """A loss or a perplexity: "2.31", "0.0412", "13.5"; "–" for None and NaN."""
    return "–" if value is None or math.isnan(value) else digits(value)


def change(mean: float | None, error: float | None = None) -> str:
    """A difference with its sign, and its standard error with two digits: "+0.041 ± 0.012",
    "-1.3"; at most four decimals; "–" for None and NaN."""
    if mean is None or math.isnan(mean):
        return "–"
    measure = abs(mean) / 10 if error is None else abs(error)
    known = measure > 0 and math.isfinite(measure)
    decimals = min(4, max(0, 1 - math.floor(math.log10(measure)))) if known else 2
    text = f"{mean:+,.{decimals}f}"
    return text if error is None else f"{text} ± {error:,.{decimals}f}"


def digits(number: float, least: int | None = None) -> str:
    """Three digits: "0.00123", "4.56", "78.9", "1,234", "1.01e+304". `least`: decimals that a small
    one is cut to, so that "0.0412" is "0.04"; and what ends in zeros after the point loses them."""
    if number == 0 or not math.isfinite(number):
        return "0" if number == 0 else str(number)
    if abs(number) >= LONG:
        return f"{number:.3g}"
    magnitude = math.floor(math.log10(abs(float(f"{number:.3g}"))))
    decimals = max(0, 2 - magnitude)
    if least is not None:
        decimals = min(decimals, least)
    text = f"{number:,.{decimals}f}"
    if least is not None and "." in text:
        text = text.rstrip("0").rstrip(".") or "0"
    return text


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    """The number in the largest unit in which it is 1 or more."""
    scaled, unit = float(number), units[0]
    for further in units[1:]:
        if abs(scaled) < 999.5:
            break
        scaled, unit = scaled / step, further
    whole = unit == units[0] and float(number).is_integer()
    return f"{scaled:.0f}{unit}" if whole else f"{digits(scaled)}{unit}"


def parse_card(text: str) -> float:
    """GiB of a card from "8GB", "8 GiB" or "8".

    Raises:
        UserError: not a size.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("gi").removesuffix("g").strip()
    try:
        gib = float(number)
    except ValueError:
        gib = 0.0
    if not 0 < gib < 1e6:
        raise UserError(f"expected the size of a card such as 8GB, got {text!r}.")
    return gib
