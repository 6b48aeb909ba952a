"""A part of the thorough tests, by `--part K/N`: each of them is in one of N parts."""

from __future__ import annotations

import zlib

import pytest

ALWAYS = tuple(
    f"tests/house/test_{name}.py"
    for name in ("commands_run", "notebook", "recipes", "site", "tutorial")
)
"""Tests that no part leaves out: what pages and recipes promise."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--part",
        metavar="K/N",
        help=f"of the thorough tests, the K-th of N parts, and all of {', '.join(ALWAYS)}",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the thorough tests of other parts: each is in one, whatever else there is."""
    part = config.getoption("--part")
    if part is None:
        return
    k, n = map(int, part.split("/"))
    if not 0 <= k < n:
        raise pytest.UsageError(f"expected --part K/N with K from 0 to N - 1, got {part}.")

    def stays(item: pytest.Item) -> bool:
        free = item.get_closest_marker("thorough") is None or item.nodeid.startswith(ALWAYS)
        return free or zlib.crc32(item.nodeid.encode()) % n == k

    config.hook.pytest_deselected(items=[item for item in items if not stays(item)])
    items[:] = [item for item in items if stays(item)]
