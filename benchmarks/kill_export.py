"""Kill a merge again and again, and fill its disk; look at what is left.

    python -m benchmarks.kill_export [--kills 20] [--seed 0]

The demo's base and an adapter of it are merged once without a kill. The same merge is then started
in a process that is killed with SIGKILL after a random share of the time that it takes, and at
random places ends with a disk that is full (a limit on the size of files stands for it). After
each: the output directory does not exist, or is the uninterrupted one byte for byte; the base and
the adapter have the bytes they had; the next merge succeeds, gives the same bytes, and removes
what the dead process has left. The whole result is what stock transformers loads.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.common import write_rows
from leanlift import LiftConfig, get_lift_model, merge_adapter, save_adapter
from leanlift.demo.run import BASE
from leanlift.model import lift_layers

PROMISES = (
    "output whole or absent",
    "inputs untouched",
    "next merge is whole",
    "nothing left behind",
)
FULL_DISK_EVERY = 5  # of these one interruption is a full disk
LONGEST = 1.4  # delays go up to so many times what a merge takes, so some come after its end
SHARD = 300_000  # bytes: several shards, so that the index is written too


def make_inputs(work: Path) -> None:
    """A base of its own and an adapter, whose offsets are random."""
    shutil.copytree(BASE, work / "base")
    model = AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    torch.manual_seed(0)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.02)
    save_adapter(model, work / "adapter")


def merge(work: Path, name: str) -> None:
    merge_adapter(
        work / "adapter",
        work / name,
        base=work / "base",
        max_shard_size=SHARD,
        progress=False,
    )


def digest(directory: Path) -> str:
    """sha256 over names and contents of everything in a directory."""
    total = hashlib.sha256()
    for path in sorted(directory.rglob("*")):
        total.update(str(path.relative_to(directory)).encode())
        total.update(path.read_bytes() if path.is_file() else b"")
    return total.hexdigest()


def leftovers(work: Path) -> list[str]:
    return [path.name for path in work.glob(".*.partial")]


def start(work: Path, limit: int | None) -> tuple[int, int]:
    """Fork a merge: (pid, the end of a pipe that closes when it has ended).

    Args:
        work: where the inputs are.
        limit: bytes that a file may have, as if the disk were full then.
    """
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write() fails with EFBIG
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        os.write(write, b"b")
        merge(work, "merged")
        os._exit(0)
    except OSError:
        os._exit(28)
    except BaseException:
        os._exit(1)


def interrupt(work: Path, delay: float | None, limit: int | None) -> str:
    """Start a merge and kill it after `delay`, or let it meet `limit`; how it ended."""
    pid, marks = start(work, limit)
    os.read(marks, 1)
    if delay is not None:
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    os.close(marks)
    if code == 1:
        raise SystemExit("a merge failed of itself")
    return {0: "ended before", 28: "failed to write", -signal.SIGKILL: "killed"}[code]


def measure(kills: int, seed: int, work: Path) -> list[dict[str, Any]]:
    """One row per interruption."""
    make_inputs(work)
    inputs = digest(work / "base"), digest(work / "adapter")
    merge(work, "whole/merged")
    started = time.perf_counter()
    merge(work, "again/merged")
    seconds = time.perf_counter() - started
    whole = digest(work / "whole/merged")
    if digest(work / "again/merged") != whole:
        raise SystemExit("two merges of the same files differ")
    AutoModelForCausalLM.from_pretrained(work / "whole/merged")
    sizes = sorted(file.stat().st_size for file in (work / "whole/merged").iterdir())
    chance = random.Random(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < kills:
        full = len(rows) % FULL_DISK_EVERY == FULL_DISK_EVERY - 1
        limit = chance.randrange(100, sizes[-1]) if full else None
        delay = None if full else chance.uniform(0, LONGEST * seconds)
        ended = interrupt(work, delay, limit)
        left, exists = leftovers(work), (work / "merged").exists()
        row = {
            "interruption": len(rows) + 1,
            "by": "full disk" if full else "SIGKILL",
            "after": f"{limit} bytes" if full else f"{delay:.3f} s of {seconds:.3f}",
            "ended": ended,
            "output": "whole" if exists else "absent",
            "half an output lay there": bool(left),
            "output whole or absent": not exists or digest(work / "merged") == whole,
            "inputs untouched": (digest(work / "base"), digest(work / "adapter")) == inputs,
        }
        shutil.rmtree(work / "merged", ignore_errors=True)
        merge(work, "merged")
        row["next merge is whole"] = digest(work / "merged") == whole
        row["nothing left behind"] = not leftovers(work)
        shutil.rmtree(work / "merged")
        rows.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no_csv", action="store_true", help="only print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(arguments.kills, arguments.seed, Path(work))
    if not arguments.no_csv:
        print(f"Wrote {write_rows('kill_export', rows)}")
    if not all(row[promise] for row in rows for promise in PROMISES):
        raise SystemExit("an interrupted merge has left something wrong")
    print(f"{len(rows)} interruptions: every output is whole or absent")


if __name__ == "__main__":
    main()
