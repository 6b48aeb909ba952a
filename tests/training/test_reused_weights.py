"""Weights that are made to recompute a block serve its backward pass: the same, made twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import assert_same_layers, settings, sparse_trainer
from sweeps import swept

from leanlift import UserError
from leanlift.layers.frozen import FrozenLinear
from leanlift.model import lift_layers, lift_state

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.mark.parametrize("reentrant", swept([False, True], False), ids=["plain", "reentrant"])
def test_a_run_is_the_same_with_a_third_fewer_weights(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reentrant: bool
) -> None:
    made: Counter[bool] = Counter()
    make = FrozenLinear.made_rows

    def counted(self: FrozenLinear, *given: Any) -> torch.Tensor:
        made[torch._C._current_graph_task_id() != -1] += 1
        return make(self, *given)

    monkeypatch.setattr(FrozenLinear, "made_rows", counted)
    trainers, counts = [], []
    for reuse in (False, True):
        made.clear()
        trainer = sparse_trainer(
            base, tmp_path / str(reuse), gradient_checkpointing=True, reuse_weights=reuse,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant}, max_steps=2,
        )  # fmt: skip
        trainer.train()
        assert lift_state(trainer.model).workspace.reuses_weights == reuse
        trainers.append(trainer)
        counts.append(dict(made))
    assert_same_layers(trainers[0].model, trainers[1].model)
    again = len(lift_layers(trainers[0].model))
    if not reentrant:
        # no block's last product is made again, and what the first block is given, which goes into
        # three, needs no gradient
        again -= 2 + 3
    assert counts[0][False] == counts[1][False]
    assert counts[0][True] - counts[1][True] == 2 * again
    assert not lift_state(trainers[1].model).workspace.waiting


def test_without_recomputation_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave reuse_weights out"):
        settings(tmp_path, gradient_checkpointing=False, reuse_weights=True)
