"""A short run as one of several processes: `torchrun … together.py BASE OUTPUT SETTINGS`.

SETTINGS is JSON: of the loop, and `lift` (of the mask), `resume`, `bad` ([process, step]: whose
loss is NaN), `killed` ([process, step]: who kills itself), `other_seed` (of the selection, by
process).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from runs import settings
from tiny import load, make_tokenizer
from transformers import TrainerCallback

from leanlift import LiftConfig, LiftTrainer, get_lift_model
from leanlift.processes import part, processes, rank

ROWS = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(96)]


class Kill(TrainerCallback):
    """Ends a process as the system would, in the middle of a step."""

    def __init__(self, process: int, step: int) -> None:
        self.process, self.step = process, step

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and rank() == self.process:
            os.kill(os.getpid(), signal.SIGKILL)


class Broken(LiftTrainer):
    """The loss of one process in one step is NaN."""

    bad: tuple[int, int] = (-1, -1)

    def _own_loss(self, *args: Any) -> torch.Tensor:
        loss = super()._own_loss(*args)
        is_bad = (rank(), self.state.global_step) == tuple(self.bad) and self.model.training
        return loss * float("nan") if is_bad else loss


def main(base: Path, output: Path, given: dict[str, Any]) -> None:
    lift, resume = given.pop("lift", {}), given.pop("resume", None)
    kind = given.pop("kind", "nf4")
    bad, killed = given.pop("bad", (-1, -1)), given.pop("killed", None)
    if given.pop("other_seed", False):
        number = int(os.environ.get("RANK", "0"))
        lift = {**lift, "selector": "random", "selection_seed": number}
    config = LiftConfig(approx_rank=8, **lift)
    loop = {"max_steps": 20, "per_device_train_batch_size": 2, "save_strategy": "steps",
            "save_steps": 8, "learning_rate": 1e-2, **given}  # fmt: skip
    trainer = Broken(
        model=get_lift_model(load(base, kind), config, progress=False),
        args=settings(output, **loop),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
        callbacks=[] if killed is None else [Kill(*killed)],
    )
    trainer.bad = bad
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    trainer.save_state()
    print(f"process {rank()}: {trainer.guard.skipped} skipped")
    if processes() > 1:
        assert trainer.model_wrapped.gradient_as_bucket_view  # and none of them is held twice
    trainer.model_wrapped = None  # what talks to the others goes before they do
    del trainer
    part()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
