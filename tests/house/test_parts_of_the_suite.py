"""Each thorough test is in one part of the suite, whatever the number of parts is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from parts import pytest_collection_modifyitems


def item(nodeid: str, thorough: bool) -> Any:
    return SimpleNamespace(nodeid=nodeid, get_closest_marker=lambda name: thorough or None)


def left_of(part: str | None) -> list[str]:
    """What a part has of forty thorough tests, two that are not, and one that is in every part."""
    items = [item(f"tests/a/test_a.py::test[{i}]", True) for i in range(40)]
    items += [item(f"tests/a/test_a.py::cheap[{i}]", False) for i in range(2)]
    items.append(item("tests/house/test_tutorial.py::test", True))
    gone: list[Any] = []
    hook = SimpleNamespace(pytest_deselected=lambda items: gone.extend(items))
    config: Any = SimpleNamespace(getoption=lambda name: part, hook=hook)
    pytest_collection_modifyitems(config, items)
    assert len(items) + len(gone) == 43
    return [each.nodeid for each in items]


@pytest.mark.parametrize("parts", [1, 2, 5])
def test_parts_are_all_of_them_and_share_none(parts: int) -> None:
    found = [left_of(f"{k}/{parts}") for k in range(parts)]
    swept = [name for part in found for name in part if "::test[" in name]
    assert sorted(swept) == sorted(name for name in left_of(None) if "::test[" in name)
    for part in found:
        assert len([name for name in part if "::test[" not in name]) == 3


def test_a_part_that_there_is_none_of_is_refused() -> None:
    with pytest.raises(pytest.UsageError, match="expected --part K/N with K from 0 to N - 1"):
        left_of("5/5")
