"""What may import what, beyond the import contracts: proven in fresh processes."""

from __future__ import annotations

import pytest
from processes import run_python

import leanlift


def run_fresh(code: str) -> None:
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("room", "absent"),
    [
        ("leanlift", {"torch", "transformers", "bitsandbytes", "trl"}),
        ("leanlift.ops", {"triton", "transformers", "bitsandbytes"}),
        ("leanlift.selection", {"transformers", "bitsandbytes", "trl"}),
        ("leanlift.layers", {"transformers", "bitsandbytes", "trl"}),
        ("leanlift.sparse", {"transformers", "bitsandbytes", "trl"}),
    ],
)
def test_a_room_brings_in_no_more_than_it_needs(room: str, absent: set[str]) -> None:
    # torch itself may import triton: what matters is that we do not need it.
    block = "import sys\nsys.modules['triton'] = None\n"
    run_fresh(f"{block}import {room}\nassert not {absent - {'triton'}} & set(sys.modules)")


def test_every_public_name_is_there() -> None:
    for name in leanlift.__all__:
        assert getattr(leanlift, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = leanlift.nothing  # type: ignore[attr-defined]
