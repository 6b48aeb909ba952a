"""One process, whatever a launcher has left in its environment."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from runs import trainer_for

from leanlift import LiftConfig, UserError
from leanlift.processes import is_first, local_rank, rank
from leanlift.training.given import several_processes

CONFIG = LiftConfig(selector="random")


def test_one_alone_is_the_first_and_writes(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):  # as a scheduler may set them, or another job
        monkeypatch.setenv(name, "3")
    assert is_first()
    assert (rank(), local_rank()) == (0, 0)
    monkeypatch.delenv("LOCAL_RANK")  # which transformers reads itself
    trainer = trainer_for(base, tmp_path / "run", CONFIG, max_steps=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_processes_that_do_not_talk_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    args: Any = SimpleNamespace(
        device=torch.device("cpu"), n_gpu=1, accelerator_config=SimpleNamespace()
    )
    several_processes(args)
    assert args.accelerator_config.dispatch_batches is False
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert not is_first()
    with pytest.raises(UserError, match=r"2 processes \(WORLD_SIZE\), and 1 talk"):
        several_processes(args)
