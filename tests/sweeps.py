"""Sweeps over many cases, of which a few are enough to see most faults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def swept(cases: Iterable[Any], *cheap: Any, whole: bool = False) -> list[Any]:
    """Cases for `pytest.mark.parametrize`: `cheap` ones in `make test`, the others thorough.

    Args:
        cases: one argument each, or tuples of several.
        cheap: some of them.
        whole: a tuple is one argument.
    """
    every = list(cases)
    assert cheap
    assert all(case in every for case in cheap), f"expected some of {every}, got {cheap}"
    return [case if case in cheap else thorough(case, whole) for case in every]


def thorough(case: Any, whole: bool = False) -> Any:
    """A case that is left out of `make test`."""
    values = case if isinstance(case, tuple) and not whole else (case,)
    return pytest.param(*values, marks=pytest.mark.thorough)
