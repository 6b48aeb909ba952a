"""What may import what, beyond the import contracts: proven in fresh processes."""

from __future__ import annotations

import pytest
from processes import run_python

import leanlift


def run_fresh(code: str) -> None:
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


HEAVY = {"transformers", "bitsandbytes", "trl"}
LOW_ROOMS = ("ops", "sparse", "selection", "layers")


def test_the_package_brings_in_nothing_heavy() -> None:
    run_fresh(f"import sys, leanlift\nassert not {HEAVY | {'torch'}} & set(sys.modules)")


def test_low_rooms_bring_in_no_more_than_they_need() -> None:
    # torch itself may import triton: what matters is that we do not need it.
    lines = ["import sys", "sys.modules['triton'] = None"]
    for room in LOW_ROOMS:
        lines += [f"import leanlift.{room}", f"assert not {HEAVY} & set(sys.modules), {room!r}"]
    run_fresh("\n".join(lines))


def test_every_public_name_is_there() -> None:
    for name in leanlift.__all__:
        assert getattr(leanlift, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leanlift.nothing  # type: ignore[attr-defined]
