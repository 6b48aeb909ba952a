"""Kill a run again and again, resume it each time, and compare what comes out.

    python -m benchmarks.kill_resume [--kills 20] [--steps 80] [--seed 0] [--schedule constant]

A run with 8-bit moments, bf16 values, stochastic rounding, a refresh every 4 steps and a
checkpoint every 3 is made once without a kill. The same run is then killed with SIGKILL: in turn
somewhere in a step, in a refresh, in a save, in a rotation and while the adapter and the reports
are written at the end, after a random delay, and resumed each time from the last whole checkpoint
(or started anew where there is none). The final adapter, optimizer
state and schedule must be those of the first run, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import write_rows
from leanlift.demo.run import BASE
from leanlift.demo.skills import TARGET_SKILL, make_rows
from leanlift.training import (
    LiftSFTConfig,
    LiftTrainer,
    RunArguments,
    callbacks,
    last_whole_checkpoint,
    run,
    run_overrides,
)

PHASES = {"step": b"t", "refresh": b"r", "save": b"s", "rotation": b"o", "end": b"e"}
LONGEST_DELAY = {"step": 0.05, "refresh": 0.15, "save": 0.03, "rotation": 0.01, "end": 0.1}
COMPARED = (
    "adapter_model.safetensors",
    "optimizer.safetensors",
    "optimizer.json",
    "scheduler.json",
    "rng_state.json",
)


def train(output: Path, data: Path, steps: int, schedule: str, pipe: int) -> None:
    """The run, in this process; writes a byte to `pipe` whenever a phase begins."""

    def marked(function: Any, mark: bytes) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            os.write(pipe, mark)
            return function(*args, **kwargs)

        return call

    patched: Any = LiftTrainer
    patched.training_step = marked(LiftTrainer.training_step, PHASES["step"])
    patched._save_checkpoint = marked(LiftTrainer._save_checkpoint, PHASES["save"])
    patched.save_state = marked(LiftTrainer.save_state, PHASES["end"])
    module: Any = callbacks
    module.refresh_mask = marked(callbacks.refresh_mask, PHASES["refresh"])
    module = run_overrides
    module.rotate = marked(run_overrides.rotate, PHASES["rotation"])
    args = RunArguments(
        model_name_or_path=str(BASE),
        dataset_name=str(data),
        density=0.05,
        approx_rank=16,
        refresh_interval=4,
        values_dtype="bfloat16",
    )
    sft = LiftSFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        optim="sparse_adamw_8bit",
        learning_rate=1e-3,
        lr_scheduler_type=schedule,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=steps,
        max_length=64,
        logging_steps=1,
        save_strategy="steps",
        save_steps=3,
        save_total_limit=2,
        gradient_checkpointing=False,
        resume_from_checkpoint="true" if last_whole_checkpoint(output) else None,
    )
    run(args, sft)


def start(output: Path, data: Path, steps: int, schedule: str, log: Path) -> tuple[int, int]:
    """Fork the run: (pid, the end of a pipe that its marks can be read from)."""
    read, write = os.pipe()
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        os.close(read)
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        train(output, data, steps, schedule, write)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def kill_in(pid: int, marks: int, phase: str, earlier: int, delay: float) -> dict[str, Any] | None:
    """Kill the run in `phase`, after `earlier` of its kind; None if it ended before.

    Returns:
        How many micro-batches had begun, and where the kill fell: in the phase, or after it.
    """
    steps = seen = 0
    while mark := os.read(marks, 1):
        steps += mark == PHASES["step"]
        seen += mark == PHASES[phase]
        if mark == PHASES[phase] and seen > earlier:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            rest = os.read(marks, 1000)
            os.close(marks)
            return {"micro-batches begun": steps, "fell": "in it" if not rest else "after it"}
    finish(pid, marks)
    return None


def finish(pid: int, marks: int) -> None:
    """Wait for a run that is left alone, and stop if it failed."""
    while os.read(marks, 1000):
        pass
    os.close(marks)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise SystemExit("a run failed of itself: see its log")


def same_files(one: Path, other: Path, steps: int) -> dict[str, bool]:
    """For each compared file whether both runs have the same bytes."""
    checkpoint = Path(f"checkpoint-{steps - steps % 3}")
    pairs = [Path("adapter_model.safetensors"), *(checkpoint / name for name in COMPARED)]
    return {str(name): (one / name).read_bytes() == (other / name).read_bytes() for name in pairs}


def measure(kills: int, steps: int, seed: int, schedule: str, work: Path) -> list[dict[str, Any]]:
    """One row per kill and one for the comparison."""
    data, log = work / "rows.jsonl", work / "log.txt"
    rows = make_rows(TARGET_SKILL, 400, split="train")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    whole, killed = work / "whole", work / "killed"
    finish(*start(whole, data, steps, schedule, log))
    chance = random.Random(seed)
    results: list[dict[str, Any]] = []
    attempts = 0
    while len(results) < kills:
        attempts += 1
        phase = list(PHASES)[len(results) % len(PHASES)]
        found = last_whole_checkpoint(killed)
        pid, marks = start(killed, data, steps, schedule, log)
        earlier = {"step": chance.randrange(8), "end": 0}.get(phase, chance.randrange(2))
        delay = chance.uniform(0, LONGEST_DELAY[phase])
        fell = kill_in(pid, marks, phase, earlier, delay)
        if fell is None:  # it came to its end: begin again, so that there is something to kill
            shutil.rmtree(killed)
            if attempts > 10 * kills:
                raise SystemExit("the runs end before they can be killed: take more steps")
            continue
        row = {
            "kill": len(results) + 1,
            "schedule": schedule,
            "phase": phase,
            "resumed from": Path(found).name if found else "nothing",
            **fell,
            "half a checkpoint lay there": (killed / ".saving").exists(),
        }
        results.append(row)
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    finish(*start(killed, data, steps, schedule, log))
    same = same_files(whole, killed, steps)
    for name, equal in same.items():
        print(f"{name}: {'the same bytes' if equal else 'DIFFERENT'}")
    for row in results:
        row["same bytes in the end"] = all(same.values())
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--schedule", default="linear", help="of the learning rate")
    parser.add_argument("--no_csv", action="store_true", help="only print")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        try:
            rows = measure(
                arguments.kills, arguments.steps, arguments.seed, arguments.schedule, Path(work)
            )
        except SystemExit:
            log = Path(work) / "log.txt"
            print(log.read_text(encoding="utf-8")[-3000:] if log.exists() else "no log")
            raise
    if not arguments.no_csv:
        print(f"Wrote {write_rows('kill_resume', rows)}")
    if not all(row["same bytes in the end"] for row in rows):
        raise SystemExit("a resumed run ended differently")


if __name__ == "__main__":
    main()
