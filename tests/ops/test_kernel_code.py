"""What ptxas makes of the kernels: registers, spills, how wide memory is read and written.

`kernel_code.csv` is the record, of two versions of Triton: that of torch 2.11, the oldest that is
supported, and the newest torch's. `UPDATE_KERNELS=1` writes the lines of the version that is
imported anew: `make kernels` has both (torch itself need not be older).
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

OLDEST = "3.6."
"""Stores 4-bit rows that begin within a block an entry at a time; the newest 16 bytes."""

STEP_WIDE = {
    (True, "bf16"): (2, 1),
    (True, "fp32"): (4, 2),
    (False, "bf16"): (6, 5),
    (False, "fp32"): (8, 6),
}
"""By 8-bit moments and dtype of values: how many loads and stores of 16 bytes a thread makes in a
step of AdamW, of the values and fp32 moments."""

Kernels = dict[str, dict[str, Any]]


def made(capability: int) -> Kernels:
    """What there is now, by the name of the kernel and its constants."""
    done = run_python(str(HERE / "kernel_code.py"), str(capability))
    assert done.returncode == 0, done.stderr[-4000:]
    rows = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    found = {}
    for row in rows:
        assert row["triton"] == TRITON.__version__, "compiled by another Triton than is imported"
        of = {"triton": row.pop("triton"), "capability": str(capability)}
        found[row["kernel"]] = {**of, **{k: str(v) for k, v in row.items()}}
    return found


def recorded() -> list[dict[str, str]]:
    with RECORD.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("capability", swept([80, 86, 89, 90, 100, 120], 90))
def test_nothing_spills_and_memory_is_read_and_written_wide(capability: int) -> None:
    found = made(capability)
    assert not {name: row["spills"] for name, row in found.items() if row["spills"] != "0"}
    rows = {name: row for name, row in found.items() if name.startswith("effective_rows_kernel")}
    assert len(rows) == 12
    for name, row in rows.items():
        crooked = "ALIGNED=False" in name and ("KIND=2" in name or "KIND=3" in name)
        if not (crooked and TRITON.__version__.startswith(OLDEST)):
            assert "128:" in row["stores"], name
        if "KIND=0" in name:  # dense
            assert "128:" in row["loads"], name
        if "KIND=2 ALIGNED=True" in name or "KIND=3 ALIGNED=True" in name:  # 4 bits
            assert "64:" in row["loads"], name
    steps = {name: row for name, row in found.items() if name.startswith("adamw_kernel")}
    assert len(steps) == 8
    for name, row in steps.items():  # eight entries of each vector a thread: a code is a byte
        wide = [f"128:{n}" for n in STEP_WIDE["EIGHT=True" in name, name.rsplit("*")[-1]]]
        assert (row["loads"].split()[0], row["stores"].split()[0]) == tuple(wide), name
        assert ("64:2" in row["loads"] and "64:2" in row["stores"]) == ("EIGHT=True" in name), name
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
        if (row["triton"], row["capability"]) != (TRITON.__version__, str(capability))
    ]
    rows = sorted(
        [*others, *found.values()], key=lambda row: (row["triton"], int(row["capability"]))
    )
    with RECORD.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def test_the_record_is_of_every_generation() -> None:
    rows = recorded()
    assert len({row["triton"] for row in rows}) == 2
    for version in {row["triton"] for row in rows}:
        of = {row["capability"] for row in rows if row["triton"] == version}
        assert of == {"80", "86", "89", "90", "100", "120"}
    assert all(row["spills"] == "0" for row in rows)
