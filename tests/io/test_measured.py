"""What a run.json says of rows that were to be kept, whoever wrote it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from leanlift.io.measured import LONGEST_KEPT, MOST_KEPT, KeptLoss, kept_in

KEPT = KeptLoss("prose.txt", 120, 122_000, 2.31, 2.35, 0.04, 0.01)


def test_what_was_written_is_read() -> None:
    alone = KeptLoss("one.txt", 1, 9, 2, 3, 1, None)
    assert kept_in({"kept": [KEPT.to_dict(), alone.to_dict()]}) == [KEPT, alone]
    assert len(kept_in({"kept": [KEPT.to_dict()] * (MOST_KEPT + 9)})) == MOST_KEPT


def test_what_is_not_finite_is_null_and_left_out() -> None:
    broken = KeptLoss("a.txt", 2, 9, 2.0, math.nan, math.inf, math.nan).to_dict()
    assert (broken["before"], broken["after"], broken["change"]) == (2.0, None, None)
    json.dumps(broken, allow_nan=False)
    assert kept_in({"kept": [broken, KEPT.to_dict()]}) == [KEPT]


@pytest.mark.parametrize("run", [None, [], "kept", {}, {"kept": {}}, {"kept": [[]]}], ids=str)
def test_where_there_is_nothing_there_is_nothing(run: Any) -> None:
    assert kept_in(run) == []


WRONG: dict[str, list[Any]] = {
    "name": [None, 5, "a\nb", "\x1b[31m", "a" * (LONGEST_KEPT + 1)],
    "rows": [None, -1, 1.5, True, "3"],
    "tokens": [None, -1, 2**61],
    "before": [None, "2", True, math.nan, math.inf, 1e9, []],
    "after": [None, -math.inf],
    "change": [None, math.nan],
    "error": ["0.1", math.nan, [], False],
}


@pytest.mark.parametrize("key", WRONG)
def test_what_is_no_such_thing_is_left_out(key: str) -> None:
    given = KEPT.to_dict()
    assert kept_in({"kept": [{k: v for k, v in given.items() if k != key}]}) == []
    for value in WRONG[key]:
        assert kept_in({"kept": [{**given, key: value}, given]}) == [KEPT], value
