"""Where a model's tensors are in its checkpoint: as rows, as JSON, and as anyone may write it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from leanlift.fingerprint import Layout, Segment, overlaps

HOME = (Segment("a", 3, 4), Segment("b", 0, 2), Segment("a", 0, 3))
TURNED = (Segment("a", 3, 4, turned=True),)


@pytest.mark.parametrize(
    ("start", "stop", "found"),
    [
        (0, 9, [("a", 3, 4, 0), ("b", 0, 2, 4), ("a", 0, 3, 6)]),
        (5, 7, [("b", 1, 1, 5), ("a", 0, 1, 6)]),
        (2, 4, [("a", 5, 2, 2)]),
        (9, 9, []),
    ],
)
def test_rows_are_found_in_their_segments(start: int, stop: int, found: list[Any]) -> None:
    assert [(p.name, p.first, p.rows, at) for p, at in overlaps(HOME, start, stop)] == found


def test_a_layout_survives_json() -> None:
    layout = Layout({"x": "y.z"}, {"m.weight": HOME, "n.weight": TURNED})
    assert [layout.is_turned(name) for name in ("m", "n", "x")] == [False, True, False]
    assert Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout
    assert layout.of({"x"}) == Layout({"x": "y.z"})
    assert not Layout.from_dict({})


def test_a_part_of_what_is_turned_is_turned() -> None:
    assert list(overlaps(TURNED, 1, 3)) == [(Segment("a", 4, 2, turned=True), 1)]


@pytest.mark.parametrize(
    "data",
    [
        [],
        {"../x": "y"},
        {"x": "../y"},
        {"x": []},
        {"x": [["a", 0, 0]]},
        {"x": [["a", -1, 2]]},
        {"x": [["a", 0, True]]},
        {"x": [["a", 0]]},
        {"x": [[1, 0, 1]]},
        {"x": 3},
        {"x": [["a", 0, 1]] * 5000},
        {"x": [["a", 0, 1, False]]},
        {"x": [["a", 0, 1, 1]]},
        {"x": [["a", 0, 1, True, True]]},
    ],
    ids=str,
)
def test_a_layout_of_anyone_is_checked(data: Any) -> None:
    with pytest.raises(
        ValueError, match=r"names of tensors|rows of tensors|a first row|true behind"
    ):
        Layout.from_dict(data)
