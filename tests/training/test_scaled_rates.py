"""Learning rates that go with the size of a matrix's weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LIFT, assert_same_layers, settings, sparse_trainer
from sweeps import swept
from tiny import load

from leanlift import UserError, get_lift_model
from leanlift.model import lift_layers
from leanlift.optim import unwrap
from leanlift.training.rates import rate_factors


def test_factors_are_the_sizes_of_the_weights_by_their_geometric_mean(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = get_lift_model(load(base), LIFT, progress=False)
    layers = lift_layers(model)
    sizes = {
        name: layer.weight_tiles.rows(0, layer.out_features).double().square().mean().sqrt().item()
        for name, layer in layers.items()
    }
    middle = math.exp(sum(map(math.log, sizes.values())) / len(sizes))
    for tile in (2**24, 2**10):  # the second one takes several tiles of each
        monkeypatch.setattr("leanlift.training.rates.TILE_BYTES", tile)
        factors = rate_factors(model)
        assert factors.keys() == layers.keys()
        for name, factor in factors.items():
            assert factor == pytest.approx(sizes[name] / middle, rel=1e-12)
    assert math.prod(factors.values()) == pytest.approx(1)
    assert max(factors.values()) > 1.01 * min(factors.values())


def test_a_matrix_of_zeros_has_the_rate_that_was_asked_for(base: Path) -> None:
    model = get_lift_model(load(base), LIFT, progress=False)
    first = next(iter(lift_layers(model).values()))
    first.weight_tiles = first.weight_tiles.__class__.__new__(first.weight_tiles.__class__)
    zeros = torch.zeros(first.out_features, first.in_features)
    first.weight_tiles = type("Zeros", (), {
        "shape": zeros.shape, "rows": lambda self, start, stop: zeros[start:stop]
    })()  # fmt: skip
    factors = rate_factors(model)
    assert next(iter(factors.values())) == 1.0
    assert all(map(math.isfinite, factors.values()))


@pytest.mark.parametrize(
    "changes",
    swept(
        [{"optim": "adamw_torch"}, {"optim_in_backward": True}, {"weight_decay": 0.1}, {}],
        {},
        {"optim": "adamw_torch"},
    ),
    ids=str,
)
def test_each_matrix_moves_by_its_own_rate(
    base: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    options = {"warmup_steps": 0, "learning_rate": 1e-3, "max_steps": 4, **changes}
    trainer = sparse_trainer(
        base, tmp_path, scale_learning_rates=True, lr_scheduler_type="constant", **options
    )
    factors = rate_factors(trainer.model)
    trainer.create_optimizer()
    layers = lift_layers(trainer.model)
    groups = {id(p): g for g in unwrap(trainer.optimizer).param_groups for p in g["params"]}
    for name, layer in layers.items():
        assert groups[id(layer.values)]["lr"] == pytest.approx(1e-3 * factors[name])
    trainer.args.max_steps = 1
    trainer.train()
    for name, layer in layers.items():
        moved = layer.values.detach().abs().max().item()
        assert moved == pytest.approx(1e-3 * factors[name], rel=0.02), name
    said = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert said == [pytest.approx(1e-3)]


def test_a_run_that_is_resumed_goes_on_with_the_same_rates(base: Path, tmp_path: Path) -> None:
    options = {"scale_learning_rates": True, "max_steps": 4, "save_steps": 2}
    whole = sparse_trainer(base, tmp_path / "run", save_strategy="steps", **options)
    whole.train()
    again = sparse_trainer(base, tmp_path / "run", save_strategy="steps", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert_same_layers(whole.model, again.model)
    plain = sparse_trainer(base, tmp_path / "plain", max_steps=4)
    plain.train()
    pairs = zip(lift_layers(whole.model).values(), lift_layers(plain.model).values(), strict=True)
    assert any(not torch.equal(one.values, other.values) for one, other in pairs)
    other = sparse_trainer(base, tmp_path / "run", save_strategy="steps", max_steps=4, save_steps=2)
    with pytest.raises(UserError, match="scale_learning_rates"):
        other.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_it_is_a_switch(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected scale_learning_rates as true or false"):
        settings(tmp_path, scale_learning_rates="perhaps")
