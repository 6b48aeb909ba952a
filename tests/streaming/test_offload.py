"""What waits on the host: the same numbers, few of them on the device, memory used again."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from families import config_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from leanlift.measure import LiveBytes
from leanlift.streaming.offload import Held, Host, Nowhere, Offload

CPU = torch.device("cpu")
BLOCKS, TOKENS, WIDE = 8, 512, 32
INPUT = TOKENS * WIDE * 4

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")


class Poisoned(Host):
    """Its buffers' bytes are spoilt the moment that they may be used again."""

    def give_back(self, buffer: Tensor) -> None:
        buffer.fill_(0xFF)
        super().give_back(buffer)


class Blocks(nn.Module):
    """Blocks that are recomputed, as those of a model are."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDE, WIDE) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(lambda x, block=block: block(x).tanh(), x, use_reentrant=False)
        return x


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().sum().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many tensors that were kept are on the device, after each that comes or goes."""
    there: set[int] = set()
    counts: list[int] = []

    def watch(name: str) -> None:
        own = getattr(Held, name)

        def watching(self: Held, *args: Any) -> Any:
            got = own(self, *args)
            (there.add if self.tensor is not None else there.discard)(self.number)
            counts.append(len(there))
            return got

        monkeypatch.setattr(Held, name, watching)

    for name in ("__init__", "bring", "leave"):
        watch(name)
    yield counts
    assert not there


def test_gradients_are_the_same_and_buffers_are_used_again() -> None:
    model, x = Blocks(), torch.randn(TOKENS, WIDE)
    wanted = gradients(model, x)
    where = Poisoned(CPU)
    context = Offload(model, where)
    for step in range(3):
        with context:
            found = gradients(model, x)
        assert all(map(torch.equal, found, wanted))
        gc.collect()
        assert where.nbytes == (BLOCKS + 1) * INPUT, step  # what the square keeps is one more
        assert sum(len(free) for free in where.free.values()) == BLOCKS + 1


def test_one_is_there_and_the_next_is_on_its_way(held: list[int]) -> None:
    """Beside the one that was handed over, one at most. None is late but where nothing said that it
    would be asked for."""
    model, x = Blocks(), torch.randn(TOKENS, WIDE)
    context = Offload(model, Poisoned(CPU))
    with context:
        gradients(model, x)
    assert max(held) == 1
    assert context.moved == BLOCKS + 1
    assert context.late == 0


def test_a_pass_has_less_alive() -> None:
    model, x = Blocks(), torch.randn(TOKENS, WIDE)
    peaks = []
    for where in (None, Nowhere()):
        model.zero_grad()
        with LiveBytes() as live:
            if where is None:
                gradients(model, x)
            else:
                with Offload(model, where):
                    y = model(x)
                    kept = live.current
                    torch.autograd.backward(y, torch.ones(()).expand(y.shape))
        peaks.append(live.peak)
    assert kept < 3 * INPUT
    assert peaks[0] - peaks[1] > (BLOCKS - 4) * INPUT


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_model_s_step_is_the_same(checkpointing: bool) -> None:
    """Without recomputation everything that autograd keeps goes, views and all."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config_of("llama"), dtype=torch.float32).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(3, 60, (2, 40))

    def step() -> list[Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = step()
    context = Offload(model, Poisoned(CPU))
    for _ in range(2):
        with context:
            assert all(map(torch.equal, step(), wanted))
    assert context.moved > 2 * (3 if checkpointing else 20)


def test_one_graph_twice_and_one_that_nobody_goes_back_through() -> None:
    model, x = Blocks(), torch.randn(TOKENS, WIDE)
    wanted = gradients(model, x)
    where = Poisoned(CPU)
    with Offload(model, where):
        loss = model(x).square().sum()
        for _ in range(2):
            model.zero_grad()
            loss.backward(retain_graph=True)
            assert all(map(torch.equal, [p.grad for p in model.parameters()], wanted))
        del loss
        model(x)
        gc.collect()
        assert all(map(torch.equal, gradients(model, x), wanted))
    gc.collect()
    assert sum(buffer.nbytes for free in where.free.values() for buffer in free) == where.nbytes


def test_what_stays() -> None:
    """Weights and views of them, what is spread out, and what is small."""
    linear = nn.Linear(WIDE, WIDE)
    context = Offload(linear, Host(CPU))
    with context:
        for stays in (linear.weight, linear.weight.T, torch.ones(1).expand(999), torch.ones(9)):
            assert isinstance(context._pack(stays), Tensor)
        goes = torch.ones(WIDE, WIDE).T
        one = context._pack(goes)
        assert isinstance(one, Held)
        assert context._pack(goes) is one, "kept twice, it goes once"
        goes.add_(1)
        assert context._pack(goes) is not one
        again = context._unpack(one)
        assert (again.stride(), again.max()) == (goes.stride(), 1)


def test_both_sides_wait_for_each_other() -> None:
    """A tensor leaves, and one that is brought back is given out, behind its copy alone; so does
    one that nobody asks for."""
    log: list[str] = []

    class Late(Nowhere):
        def out(self, held: Held, tensor: Tensor) -> Any:
            return f"out {held.number}"

        def back(self, held: Held, into: Tensor) -> Any:
            log.append(f"bring {held.number}")
            return f"back {held.number}"

        def wait(self, event: Any) -> None:
            log.append(f"wait {event}")

    context = Offload(nn.Linear(1, 1), Late())
    with context:
        one, two, three = (context._pack(torch.ones(TOKENS, WIDE)) for _ in range(3))
        assert log == ["wait out 0", "wait out 1"]
        log.clear()
        context._unpack(three)
        assert log == ["wait out 2", "bring 1"]
        log.clear()
        context._unpack(two)
        assert log == ["wait back 1", "bring 0"]
        log.clear()
        del one
        assert log == ["wait back 0"]
    assert context.late == 0
