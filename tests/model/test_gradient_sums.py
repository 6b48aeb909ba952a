"""Gradients of several micro-batches, added up for an update in the last one's backward pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import load

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.model import claim, lift_layers, lifted, stream_base
from leanlift.model.stream_state import let_rest, state_pool_of, stream_moments
from leanlift.optim import SparseAdamW
from leanlift.streaming import nbytes_of
from leanlift.training.step_guard import GradientHooks, StepGuard

CPU, LAYERS = torch.device("cpu"), 4
IDS = torch.randint(3, 60, (3, 2, 24), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("spoilt_buffers")


class Run:
    """A step of three micro-batches, of which the last goes through the first blocks alone."""

    def __init__(self, path: Path, streams: bool) -> None:
        torch.manual_seed(0)
        model = load(path, "nf4+double")
        if streams:
            stream_base(model, CPU, state=True)
        config = LiftConfig(approx_rank=8, values_dtype="bfloat16")
        self.model = get_lift_model(model, config, progress=False).train()
        claim(lifted(self.model))
        self.layers = lift_layers(self.model)
        self.optimizer = SparseAdamW([layer.values for layer in self.layers.values()], 1e-2)
        self.guard = StepGuard(3)

    def losses(self, at: int) -> torch.Tensor:
        if at < 2:
            return self.model(input_ids=IDS[at], labels=IDS[at], use_cache=False).loss
        asked = {"input_ids": IDS[at], "output_hidden_states": True, "use_cache": False}
        return self.model(**asked).hidden_states[2].float().square().mean()

    def ordinary(self) -> None:
        torch.manual_seed(1)
        for at in range(3):
            self.losses(at).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def in_backward(self, spoilt: int | None = None) -> bool:
        """Whether it was applied; with a micro-batch whose loss is not finite."""
        torch.manual_seed(1)
        at = 0
        hooks = GradientHooks(self.model, self.guard, self.optimizer, lambda: at == 2)
        stream_moments(self.model, self.optimizer, accumulate=True)
        for at in range(3):
            loss = self.losses(at) * (float("nan") if at == spoilt else 1)
            self.guard.see_loss(loss)
            loss.backward()
        hooks.update_what_waits()
        applied = self.guard.end_step(1, lambda: "")
        if not applied:
            hooks.drop_step()
        let_rest(self.model)
        assert all(layer.values.grad is None for layer in self.layers.values())
        sums = [layer.gradient_sum for layer in self.layers.values()]
        assert all(each is None or not each.any() for each in sums)
        hooks.remove()
        assert all(layer.gradient_sum is None for layer in self.layers.values())
        return applied

    def assert_same(self, other: Run) -> None:
        for name, layer in self.layers.items():
            twin = other.layers[name]
            assert torch.equal(layer.values, twin.values), name
            one, two = self.optimizer.state[layer.values], other.optimizer.state[twin.values]
            assert one.keys() == two.keys()
            assert one["step"] == two["step"] == 1
            assert all(torch.equal(one[key], two[key]) for key in one if key != "step"), name


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
def test_what_the_last_micro_batch_does_not_reach_is_updated_too(streams: bool, deep_base) -> None:
    base = deep_base("llama")
    ordinary, other = Run(base, False), Run(base, streams)
    ordinary.ordinary()
    assert other.in_backward()
    assert (state_pool_of(other.model) is not None) == streams
    other.assert_same(ordinary)
    assert all(layer.values.any() for layer in other.layers.values())


@pytest.mark.parametrize("streams", [False, True], ids=["resident", "streamed"])
@pytest.mark.parametrize("spoilt", [0, 2])
def test_a_step_with_a_bad_micro_batch_leaves_nothing_behind(
    spoilt: int, streams: bool, deep_base
) -> None:
    ordinary, other = Run(deep_base("llama"), False), Run(deep_base("llama"), streams)
    assert not other.in_backward(spoilt)
    assert not any(layer.values.any() for layer in other.layers.values())
    assert all(other.optimizer.state[v.values]["step"] == 0 for v in other.layers.values())
    ordinary.ordinary()
    assert other.in_backward()
    other.assert_same(ordinary)


def test_a_micro_batch_that_updates_nothing_writes_back_its_sums_alone(
    deep_base, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, now = Run(deep_base("llama"), True), False
    hooks = GradientHooks(run.model, run.guard, run.optimizer, lambda: now)
    stream_moments(run.model, run.optimizer, accumulate=True)
    pool = state_pool_of(run.model)
    hosts = {block.host.untyped_storage().data_ptr() for block in pool.blocks}
    transfer, back = pool._transfer, [0]

    def seen(source: torch.Tensor, target: torch.Tensor) -> None:
        back[-1] += target.nbytes if target.untyped_storage().data_ptr() in hosts else 0
        transfer(source, target)

    monkeypatch.setattr(pool, "_transfer", seen)
    for now in (False, True):  # noqa: B007 (the hooks ask for it)
        loss = run.losses(0)
        run.guard.see_loss(loss)
        loss.backward()
        let_rest(run.model)
        back.append(0)
    states = [state() for state in pool.states]
    sums = nbytes_of(t.nbytes for state in states for t in state.summed)
    updated = nbytes_of(t.nbytes for state in states for t in state.written)
    assert back == [sums, sums + updated, 0]
    hooks.remove()


def test_a_second_gradient_in_one_micro_batch_is_refused(deep_base) -> None:
    run = Run(deep_base("llama"), False)
    hooks = GradientHooks(run.model, run.guard, run.optimizer, lambda: False)
    for _ in range(2):  # two micro-batches
        loss = run.losses(0)
        run.guard.see_loss(loss)
        loss.backward()
    with pytest.raises(UserError, match="second gradient in one step"):
        run.losses(0).backward()
    hooks.remove()
