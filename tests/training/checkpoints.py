"""A run with checkpoints to go on from, and checkpoints that were changed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from leanlift import LiftConfig
from leanlift.training.checkpointing.directory import put_in_place
from leanlift.training.checkpointing.whole import SEAL

RESUMED = LiftConfig(approx_rank=8, refresh_interval=4)
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6}


def copied(finished: Path, to: Path, *steps: int) -> Path:
    to.mkdir(exist_ok=True)
    for step in steps:
        shutil.copytree(finished / f"checkpoint-{step}", to / f"checkpoint-{step}")
    return to


def resealed(checkpoint: Path) -> Path:
    """As if the damage had been written by leanlift itself."""
    kept = json.loads((checkpoint / SEAL).read_text())["settings"]
    staged = checkpoint.parent / ".saving" / checkpoint.name
    staged.parent.mkdir(exist_ok=True)
    checkpoint.rename(staged)
    return put_in_place(staged, kept)
