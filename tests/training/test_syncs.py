"""Nothing of ours makes the host wait for the device inside a training step.

Without a GPU: the operations that would ask a device for an answer are caught on the CPU, with
the line of leanlift that asked.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import Broken, sparse_trainer
from torch.utils._python_dispatch import TorchDispatchMode

import leanlift

PACKAGE = Path(leanlift.__file__).parent
ASK = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique", "unique_dim")
ON_THE_CPU_ANYWAY = {
    ("optim/adamw.py", "_update"): "the step count; torch's way asks `apply` too",
    ("optim/arithmetic.py", "_zeros_of"): "asked on a CPU only",
    ("training/batches.py", "see"): "whether a mask pads is asked of a CPU alone",
    ("training/loss.py", "trained_positions"): "where batches are made",
}
ONCE_A_STEP = ("training/step_guard.py", "_is_fine")
WHEN_LOGGED = ("training/overrides.py", "read_metrics")


class Asking(TorchDispatchMode):
    """Who asked, as (file, function), for operations whose answer the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])
        counts_unknown = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if name in ASK or by_mask or counts_unknown:
            self._note()
        return func(*args, **(kwargs or {}))

    def _note(self) -> None:
        frame = sys._getframe(2)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            if PACKAGE in path.parents and not frame.f_code.co_name.startswith("<"):
                place = path.relative_to(PACKAGE).as_posix(), frame.f_code.co_name
                self.asked.append(place)
                return
            if path.parent.name in ("transformers", "trainer", "accelerate"):
                return  # theirs
            frame = frame.f_back  # type: ignore[assignment]


@pytest.mark.parametrize("inside", [False, True], ids=["ordinary", "in-backward"])
@pytest.mark.parametrize("optim", ["sparse_adamw", "sparse_adamw_8bit"])
def test_a_training_step_asks_the_device_once(
    base: Path,
    tmp_path: Path,
    optim: str,
    inside: bool,
) -> None:
    trainer = sparse_trainer(
        base, tmp_path, optim=optim, optim_in_backward=inside, max_steps=4, logging_steps=100
    )
    with Asking() as mode:
        trainer.train()
    asked = [place for place in mode.asked if place not in ON_THE_CPU_ANYWAY]
    steps = [place for place in asked if place == ONCE_A_STEP]
    assert len(steps) == 4
    assert {place for place in asked if place != ONCE_A_STEP} <= {WHEN_LOGGED}


def test_who_asks_is_seen(base: Path, tmp_path: Path) -> None:
    trainer = sparse_trainer(base, tmp_path, max_steps=1)
    trainer.data_collator = trainer.data_collator.collator  # positions are then asked of the device
    with Asking() as mode:
        trainer.train()
    assert ("training/loss.py", "trained_positions") in mode.asked


def test_a_bad_loss_is_logged_as_the_last_good_one(base: Path, tmp_path: Path) -> None:
    trainer = sparse_trainer(base, tmp_path, kind=Broken, max_steps=3, logging_steps=1)
    trainer.bad_steps = (2,)
    trainer.train()
    one, two, three = (e["loss"] for e in trainer.state.log_history if "loss" in e)
    assert two == one != three
