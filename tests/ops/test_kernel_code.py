"""What ptxas makes of the kernels: registers, spills, how wide memory is read and written.

`kernel_code.csv` is the record, of one version of Triton; `UPDATE_KERNELS=1` writes it anew.
"""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import pytest
from processes import run_python
from sweeps import swept

TRITON = pytest.importorskip("triton", reason="Triton has no build for this platform")
HERE = Path(__file__).parent
RECORD = HERE / "kernel_code.csv"

SPILLS = 8
"""Loads and stores of what does not fit registers, in the step with 8-bit moments: of 2,600
instructions ptxas makes so many on some generations. All other kernels have none."""

Kernels = dict[str, dict[str, Any]]


def made(capability: int) -> Kernels:
    """What there is now, by the name of the kernel and its constants."""
    done = run_python(str(HERE / "kernel_code.py"), str(capability))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    of = {"triton": TRITON.__version__, "capability": str(capability)}
    return {row["kernel"]: {**of, **{k: str(v) for k, v in row.items()}} for row in rows}


def recorded() -> list[dict[str, str]]:
    with RECORD.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("capability", swept([80, 86, 89, 90, 100, 120], 90))
def test_next_to_nothing_spills_and_rows_are_read_and_written_wide(capability: int) -> None:
    found = made(capability)
    spills = {name: int(row["spills"]) for name, row in found.items() if row["spills"] != "0"}
    assert all("adamw_kernel EIGHT=True" in name for name in spills), spills
    assert max(spills.values(), default=0) <= SPILLS
    rows = {name: row for name, row in found.items() if name.startswith("effective_rows_kernel")}
    assert len(rows) == 12
    for name, row in rows.items():
        assert "128:" in row["stores"], name
        if "KIND=0" in name:  # dense
            assert "128:" in row["loads"], name
        if "KIND=2 ALIGNED=True" in name or "KIND=3 ALIGNED=True" in name:  # 4 bits
            assert "64:" in row["loads"], name
    if os.environ.get("UPDATE_KERNELS"):
        write(capability, found)
    for row in recorded():
        same = row["triton"] == TRITON.__version__ and row["capability"] == str(capability)
        if same and row["kernel"] in found:
            assert found[row["kernel"]] == row


def write(capability: int, found: Kernels) -> None:
    before = recorded() if RECORD.is_file() else []
    others = [
        row
        for row in before
        if row["triton"] == TRITON.__version__ and row["capability"] != str(capability)
    ]
    rows = sorted([*others, *found.values()], key=lambda row: int(row["capability"]))
    with RECORD.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_the_record_is_of_every_generation() -> None:
    assert {row["capability"] for row in recorded()} == {"80", "86", "89", "90", "100", "120"}
    assert len({row["triton"] for row in recorded()}) == 1
