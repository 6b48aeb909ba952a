"""What redrawing the house costs: the demo's training and a training step, before and after.

    python -m benchmarks.redrawn [--former f66cdc1] [--steps 15] [--demos 3]

The code of a former commit is taken out of git into a temporary directory; it and the present tree
run in processes of their own with the same libraries, in turn, so that both see the same machine.
A step is `cpu_step`'s: a Llama over NF4, forward, backward and torch's AdamW, in bf16 and in fp32.
The demo's training is `Trainer.train` in a whole `leanlift demo`. Times are medians of a process's
own CPU time on one thread.

    python -m benchmarks.redrawn --worker step-bfloat16 | step-float32 | demo    (used by itself)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
FORMER = "f66cdc1"
"""The last commit before the rooms were moved."""

HIDDEN, LAYERS, TOKENS = 1024, 8, 128
WARM = 3
"""Steps of each before any is counted."""


# --- one side, in its own process -------------------------------------------------------------


def step_worker(dtype: str) -> None:
    """Take a step for each line that comes in, and say how long it took."""
    import torch

    from benchmarks.cpu_step import build

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(sys.stderr):
        peer = build("leanlift", HIDDEN, LAYERS, TOKENS, getattr(torch, dtype))
    print(_code(), flush=True)
    for _ in sys.stdin:
        started = time.process_time()
        peer.step()
        print(time.process_time() - started, flush=True)


def demo_worker() -> None:
    """Run the demo, and say how long it trained."""
    import torch
    import transformers

    from leanlift.demo.run import demo

    torch.set_num_threads(1)
    stock, taken = transformers.Trainer.train, []

    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        done = stock(self, *args, **kwargs)
        taken.append(time.process_time() - started)
        return done

    transformers.Trainer.train = train
    with tempfile.TemporaryDirectory() as place, contextlib.redirect_stdout(io.StringIO()):
        demo(Path(place) / "out")
    print(_code(), sum(taken), sep="\n", flush=True)


def _code() -> Path:
    """Where this process has leanlift from."""
    import leanlift

    return Path(leanlift.__file__).parents[1]


# --- both sides, in turn ----------------------------------------------------------------------


def taken_out(commit: str, place: Path) -> Path:
    """The tree of a commit, without its history."""
    packed = place / "former.tar"
    subprocess.run(["git", "archive", "-o", str(packed), commit], cwd=ROOT, check=True)
    with tarfile.open(packed) as archive:
        archive.extractall(place / "former", filter="data")
    return place / "former"


def start(tree: Path, what: str) -> subprocess.Popen[str]:
    """A worker over the code of a tree. This file is the present one in both."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    environment["HF_HUB_OFFLINE"] = "1"
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), "--worker", what],
        cwd=tree, env=environment, text=True, bufsize=1,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def said(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    line = worker.stdout.readline().strip()
    if not line:
        raise SystemExit("a worker has ended early: run it by hand to see why.")
    return line


def check_code(worker: subprocess.Popen[str], tree: Path) -> None:
    """A worker first says whose code it runs."""
    if Path(said(worker)).resolve() != tree.resolve():
        raise SystemExit(f"a worker runs other code than {tree}.")


def steps(trees: dict[str, Path], what: str, count: int) -> dict[str, list[float]]:
    """Seconds of steps of both sides, one of each in turn."""
    workers = {name: start(tree, what) for name, tree in trees.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    try:
        for name, worker in workers.items():
            check_code(worker, trees[name])
        for number in range(WARM + count):
            for name, worker in workers.items():
                assert worker.stdin is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                taken = float(said(worker))
                if number >= WARM:
                    seconds[name].append(taken)
    finally:
        for worker in workers.values():
            worker.kill()
            worker.wait()
    return seconds


def demos(trees: dict[str, Path], count: int) -> dict[str, list[float]]:
    """Seconds of training in whole demos, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in trees}
    for _ in range(count):
        for name, tree in trees.items():
            worker = start(tree, "demo")
            check_code(worker, tree)
            seconds[name].append(float(said(worker)))
            worker.wait()
    return seconds


def row(what: str, seconds: dict[str, list[float]], former: str) -> dict[str, Any]:
    """The medians of both sides, and their ratio."""
    middle = {name: median(taken) for name, taken in seconds.items()}
    return {
        "what": what,
        "former commit": former,
        "former s": round(middle["former"], 4),
        "present s": round(middle["present"], 4),
        "present / former": round(middle["present"] / middle["former"], 4),
        "least / least": round(min(seconds["present"]) / min(seconds["former"]), 4),
        "times": len(seconds["present"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--former", default=FORMER)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--demos", type=int, default=3)
    parser.add_argument("--worker", choices=["step-bfloat16", "step-float32", "demo"])
    arguments = parser.parse_args()
    if arguments.worker == "demo":
        return demo_worker()
    if arguments.worker:
        return step_worker(arguments.worker.removeprefix("step-"))
    from benchmarks.common import write_rows

    rows = []
    with tempfile.TemporaryDirectory() as place:
        trees = {"former": taken_out(arguments.former, Path(place)), "present": ROOT}
        for dtype in ("bfloat16", "float32") if arguments.steps else ():
            found = steps(trees, f"step-{dtype}", arguments.steps)
            rows.append(row(f"a step in {dtype}", found, arguments.former))
            print(rows[-1], flush=True)
        if arguments.demos:
            found = demos(trees, arguments.demos)
            rows.append(row("the demo's training", found, arguments.former))
            print(rows[-1], flush=True)
    if arguments.steps and arguments.demos:
        print(f"Wrote {write_rows('redrawn', rows)}")
    return None


if __name__ == "__main__":
    main()
