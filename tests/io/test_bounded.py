"""JSON within bounds: what is ordinary passes, what is made to cost is a sentence."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leanlift import UserError
from leanlift.io.bounded import MOST_DEPTH, MOST_DIGITS, parse_bounded, read_bounded
from leanlift.io.tensors import read_json


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    """A read that waits for ever fails instead."""

    def late(*args: Any) -> None:
        raise AssertionError("a read waited for somebody")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_depth_has_a_bound(opening: str) -> None:
    closing = "]" if opening == "[" else "}"
    inner = "[]" if opening == "[" else "{}"
    deepest = opening * (MOST_DEPTH - 1) + inner + closing * (MOST_DEPTH - 1)
    assert parse_bounded(deepest) is not None
    for more in (1, 100, 900, 100_000):
        with pytest.raises(ValueError, match="nested"):
            parse_bounded(opening * more + deepest + closing * more)


def test_integers_have_a_bound_and_ordinary_numbers_do_not() -> None:
    ordinary = [0, -1, 2**63, -(2**63), 2**128, 1.5e300, 10 ** (MOST_DIGITS - 1)]
    assert parse_bounded(str(ordinary)) == ordinary
    for digits in (MOST_DIGITS + 1, 400, 10_000):
        with pytest.raises(ValueError, match="digits"):
            parse_bounded("[" + "9" * digits + "]")


def test_files_have_a_kind_and_a_bound(tmp_path: Path) -> None:
    file = tmp_path / "file.json"
    file.write_text("[1]")
    assert read_bounded(file) == read_bounded(file, 3) == "[1]"
    with pytest.raises(ValueError, match="3 bytes, more than 2"):
        read_bounded(file, 2)
    with file.open("wb") as sparse:
        sparse.truncate(2**40)
    pipe, device, link = tmp_path / "pipe", tmp_path / "device", tmp_path / "link"
    os.mkfifo(pipe)
    device.symlink_to("/dev/zero")
    link.symlink_to(pipe)
    for strange in (file, pipe, device, link, tmp_path):
        with pytest.raises(UserError, match=r"is not valid JSON|cannot be read"):
            read_json(strange)
