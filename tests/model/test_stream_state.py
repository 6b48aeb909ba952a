"""What is learned in blocks that come from the host: the same to the bit as where it stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept
from tiny import load

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, save_adapter
from leanlift.model import claim, lift_layers, lifted, refresh_mask, restore_adapter, stream_base
from leanlift.model.stream_state import (
    check_updates_in_backward,
    check_used_once,
    let_rest,
    state_pool_of,
    stream_moments,
)
from leanlift.optim import SparseAdamW, restore_state, saved_state
from leanlift.streaming import BUFFERS
from leanlift.training.step_guard import GradientHooks, StepGuard

CPU, LAYERS = torch.device("cpu"), 5
BASES = ("llama", "gpt2, turned", "qwen3, experts", "phi3, fused")
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated"),
    pytest.mark.usefixtures("spoilt_buffers"),
]


class Run:
    """Steps with updates in the backward pass."""

    def __init__(self, path: Path, streams: bool, kind: str, moments: str, dtype: str) -> None:
        torch.manual_seed(0)
        model = load(path, kind)
        if streams:
            stream_base(model, CPU, state=True)
        config = LiftConfig(approx_rank=8, refresh_interval=2, values_dtype=dtype)
        self.model = get_lift_model(model, config, progress=False)
        claim(lifted(self.model))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.start(moments)

    def start(self, moments: str) -> None:
        values = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = SparseAdamW(values, 1e-2, moments=moments)

    def steps(self, count: int) -> list[float]:
        """Losses; a refresh after the second step."""
        torch.manual_seed(1)
        stream_moments(self.model, self.optimizer)
        guard = StepGuard(3)
        hooks = GradientHooks(self.model, guard, self.optimizer)
        losses = []
        self.model.train()
        for step in range(count):
            loss = self.model(input_ids=IDS, labels=IDS, use_cache=False).loss
            loss.backward()
            assert guard.end_step(step, lambda: "")
            let_rest(self.model)
            losses.append(loss.item())
            if step == 1:
                refresh_mask(self.model, self.optimizer)
        hooks.remove()
        return losses

    @property
    def saved(self) -> Any:
        return saved_state(self.optimizer, lifted(self.model).named_parameters())

    def answers(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.model.eval()
        with torch.no_grad():
            logits = self.model(input_ids=IDS, use_cache=False).logits
            said = self.model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
        return logits, said


@pytest.mark.parametrize("moments", swept(["8bit", "float32"], "8bit"))
@pytest.mark.parametrize("kind", swept(["nf4+double", "int8", "dense"], "nf4+double"))
@pytest.mark.parametrize("family", swept(BASES, "llama"))
def test_training_saving_and_going_on_are_the_same(
    family: str, kind: str, moments: str, deep_base, tmp_path: Path
) -> None:
    dtype = "bfloat16" if moments == "8bit" else "float32"
    runs = [Run(deep_base(family), streams, kind, moments, dtype) for streams in (False, True)]
    resident, streamed = runs
    assert streamed.steps(4) == resident.steps(4)
    pool = state_pool_of(streamed.model)
    assert state_pool_of(resident.model) is None
    assert pool.written_back >= 4 * len(pool.blocks) - BUFFERS
    for one, other in zip(streamed.answers(), resident.answers(), strict=True):
        assert torch.equal(one, other)
    files = []
    for run, name in zip(runs, ("resident", "streamed"), strict=True):
        save_adapter(run.model, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    kept = [run.saved for run in runs]
    assert kept[0].facts == kept[1].facts
    assert kept[0].tensors.keys() == kept[1].tensors.keys()
    assert all(torch.equal(kept[0].tensors[key], kept[1].tensors[key]) for key in kept[0].tensors)
    for run in runs:  # back to what was saved, with an optimizer made anew
        run.steps(1)
        restore_adapter(run.model, tmp_path / "streamed")
        run.start(moments)
        restore_state(run.optimizer, lifted(run.model).named_parameters(), kept[0])
    assert streamed.steps(3) == resident.steps(3)
    again = load(deep_base(family), kind)
    stream_base(again, CPU, state=True)
    again = load_adapter(again, tmp_path / "streamed")
    fresh = load_adapter(load(deep_base(family), kind), tmp_path / "streamed")
    ask = {"input_ids": IDS, "use_cache": False}
    with torch.no_grad():
        assert torch.equal(again.eval()(**ask).logits, fresh.eval()(**ask).logits)
    assert state_pool_of(again).copies >= len(state_pool_of(again).blocks)


def test_between_two_passes_all_is_on_the_host(deep_base) -> None:
    run = Run(deep_base("llama"), True, "nf4+double", "8bit", "bfloat16")
    run.steps(1)
    pool = state_pool_of(run.model)
    places = [(b.host.data_ptr(), b.host.data_ptr() + b.host.nbytes) for b in pool.blocks]
    for layer in lift_layers(run.model).values():
        index = layer.index
        moments = run.optimizer.moments_of(layer.values)
        for tensor in (layer.values.data, index.columns, index.counts, index.ends, *moments):
            assert any(a <= tensor.data_ptr() < b for a, b in places)


def test_a_pass_without_updates_writes_nothing_back(deep_base) -> None:
    run = Run(deep_base("llama"), True, "nf4+double", "8bit", "bfloat16")
    run.steps(1)
    pool = state_pool_of(run.model)
    before = pool.written_back, pool.copies
    run.answers()
    assert pool.written_back == before[0]
    assert pool.copies > before[1]
    run.steps(1)
    assert pool.written_back - before[0] == len(pool.blocks)


def test_moving_the_model_moves_no_state(deep_base) -> None:
    run = Run(deep_base("llama"), True, "nf4+double", "8bit", "bfloat16")
    run.steps(1)
    layer = next(iter(lift_layers(run.model).values()))
    before = layer.values, layer.values.data_ptr(), layer.index
    run.model.to(torch.float64)
    assert layer.values is before[0]
    assert layer.values.data_ptr() == before[1]
    assert layer.index is before[2]
    assert layer.values.dtype == torch.bfloat16


def test_it_is_refused_where_gradients_wait(deep_base) -> None:
    run = Run(deep_base("llama"), True, "nf4+double", "8bit", "bfloat16")
    with pytest.raises(UserError, match=r"LiftTrainer and optim_in_backward=True"):
        check_updates_in_backward(run.model, False)
    check_updates_in_backward(run.model, True)
    with pytest.raises(UserError, match=r"call it before get_lift_model"):
        stream_base(get_lift_model(load(deep_base("llama")), progress=False), CPU, state=True)


def test_blocks_that_are_gone_through_several_times_are_refused(deep_base) -> None:
    model = load(deep_base("llama"))
    check_used_once(model)
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(UserError, match="goes through the same block several times"):
        check_used_once(model)
    stream_base(model, CPU, state=True)
    with pytest.raises(UserError, match=r"goes through the same block several times.*stream_state"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_an_embedding_and_a_head_that_are_one_are_no_block(deep_base) -> None:
    model = load(deep_base("qwen2, tied"), "nf4+double")
    stream_base(model, CPU, state=True)
    model = get_lift_model(
        model, LiftConfig(approx_rank=8, quantize_embeddings=True), progress=False
    )
    check_used_once(lifted(model))
    assert state_pool_of(model) is not None


def test_a_second_gradient_in_one_step_is_refused(deep_base) -> None:
    run = Run(deep_base("llama"), False, "nf4+double", "8bit", "bfloat16")
    hooks = GradientHooks(run.model, StepGuard(3), run.optimizer)
    for expected in (False, True):
        loss = run.model(input_ids=IDS, labels=IDS, use_cache=False).loss
        if expected:
            with pytest.raises(UserError, match="second gradient in one step"):
                loss.backward()
        else:
            loss.backward()
    hooks.remove()


def test_streamed_state_knows_one_adapter(deep_base) -> None:
    run = Run(deep_base("llama"), True, "nf4+double", "8bit", "bfloat16")
    layer = next(iter(lift_layers(run.model).values()))
    with pytest.raises(UserError, match="that of one adapter"):
        layer.take_off()


def test_an_adapter_that_is_loaded_between_passes_is_computed_with(
    deep_base, tmp_path: Path
) -> None:
    """Blocks that wait in a buffer have other numbers by then."""
    runs = [
        Run(deep_base("llama"), streams, "nf4+double", "8bit", "bfloat16") for streams in (0, 1)
    ]
    for run in runs:
        run.steps(1)
    save_adapter(runs[0].model, tmp_path / "early")
    before = runs[1].answers()[0]
    for run in runs:
        run.steps(3)
        run.answers()
        restore_adapter(run.model, tmp_path / "early")
    assert torch.equal(runs[1].answers()[0], before)
    assert torch.equal(runs[1].answers()[0], runs[0].answers()[0])
