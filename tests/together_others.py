"""A short run of one of TRL's trainers as one of several processes:
`torchrun … together_others.py METHOD BASE OUTPUT SETTINGS`.

SETTINGS is JSON: of the loop, and `lift` (of the mask), `resume`, `other_seed` (of the selection,
by process), `bad` ([process, step]: whose gradients are NaN).
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from other_trainers import make
from tiny import load

from leanlift import LiftCallback, LiftConfig, get_lift_model
from leanlift.model import lift_layers, lift_state
from leanlift.processes import rank


def digest(model: Any) -> str:
    found = hashlib.sha256()
    for layer in lift_layers(model).values():
        for store in layer.learned.stores:
            for tensor in (store.index.columns, store.index.counts, store.values):
                found.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def main(method: str, base: Path, output: Path, given: dict[str, Any]) -> None:
    lift, resume = given.pop("lift", {}), given.pop("resume", None)
    bad = given.pop("bad", None)
    if given.pop("other_seed", False):
        number = int(os.environ.get("RANK", "0"))
        lift = {**lift, "selector": "random", "selection_seed": number}
    config = LiftConfig(approx_rank=8, **{"refresh_interval": 2, **lift})
    model, callback = get_lift_model(load(base), config, progress=False), LiftCallback()
    trainer = make(method, model, output, [callback], **given)

    def broken(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        now = [rank(), trainer.state.global_step] == bad and torch.is_grad_enabled()
        return out * float("nan") if now else out

    model.get_base_model().model.norm.register_forward_hook(broken)
    trainer.train(resume_from_checkpoint=resume)
    found = {"digest": digest(model), "refreshes": lift_state(model).refreshes,
             "skipped": callback.guard.skipped}  # fmt: skip
    (output / f"process-{rank()}.json").write_text(json.dumps(found))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4]))
