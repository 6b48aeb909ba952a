"""What a person reads: numbers in words, bars, tables, and the terminal they go to.

Numbers have at most three digits and a unit. Everything returns plain text, but `console`, which
imports rich when it is asked for: a command that prints one sentence does not pay for it.
"""

from leanlift.format.kept import kept_words
from leanlift.format.names import name_of, short_name
from leanlift.format.numbers import change, count, duration, gib, loss, parse_card, share, size
from leanlift.format.pictures import bar, sparkline
from leanlift.format.terminal import console, table

__all__ = [
    "bar",
    "change",
    "console",
    "count",
    "duration",
    "gib",
    "kept_words",
    "loss",
    "name_of",
    "parse_card",
    "share",
    "short_name",
    "size",
    "sparkline",
    "table",
]
