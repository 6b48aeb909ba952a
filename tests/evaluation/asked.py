"""Rows that an evaluation asks."""

from __future__ import annotations

ROWS = [
    {"prompt": "add 1 and 22: ", "completion": "23"},
    {"prompt": "x", "completion": "a much longer completion than the others"},
    {"prompt": "a long prompt that has a short completion: ", "completion": "y"},
    {"prompt": "echo abc: ", "completion": "abc"},
    {"prompt": "five ", "completion": "5"},
]
