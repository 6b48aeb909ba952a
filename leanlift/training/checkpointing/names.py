"""The files of a checkpoint, and what its directory is called."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STAGING = ".saving"
REMOVED = ".removed-"

TRAINER_STATE = "trainer_state.json"
OPTIMIZER_TENSORS = "optimizer.safetensors"
OPTIMIZER_FACTS = "optimizer.json"
SCHEDULE = "scheduler.json"
RANDOM = "rng_state.json"
SCALE = "scaler.json"
SEAL = "checkpoint.json"
PICKLED = {OPTIMIZER_FACTS: "optimizer.pt", SCHEDULE: "scheduler.pt", RANDOM: "rng_state.pth"}
"""Trainer's own names, for what is not plain and for older checkpoints."""
FORMAT_VERSION = 1


def random_name(process: int) -> str:
    """The file with the random numbers' state of one of several processes; of one alone, RANDOM."""
    return RANDOM if process == 0 else RANDOM.replace(".", f"_{process}.")


def step_of(path: Path) -> int:
    """The number in a checkpoint's name; -1 where it has another one."""
    stem, _, number = path.resolve().name.rpartition("-")
    return int(number) if stem == PREFIX_CHECKPOINT_DIR and number.isdecimal() else -1
