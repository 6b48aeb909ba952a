"""A stack of experts against one dense matrix per expert and torch's own autograd, in fp64.

Tolerances are those of `test_layer`: twice the error of plain torch in the same dtype, and a tenth
of its epsilon.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from helpers import random_flat, random_weight, relative_error, retire
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from leanlift.layers import FrozenExperts, LiftExperts, Workspace
from leanlift.sparse import SegmentedIndex
from leanlift.weights.stacks import ExpertStack, StackWeight

SHAPES = {"4 of 64x48": (4, 64, 48), "5 of 33x70": (5, 33, 70), "1 of 20x257": (1, 20, 257)}
HITS = {
    "even": lambda experts: [3] * experts,
    "uneven": lambda experts: [7, *range(1, experts)],
    "some without tokens": lambda experts: [0, 9, 0, 2, 0][:experts],
    "the last alone": lambda experts: [0] * (experts - 1) + [6],
    "none": lambda experts: [0] * experts,
}

each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
each_hit = pytest.mark.parametrize("hit", HITS.values(), ids=HITS.keys())
each_way = pytest.mark.parametrize("turned", [True, False], ids=["out x in", "in x out"])


def make_experts(
    shape: tuple[int, int, int],
    density: float = 0.1,
    dtype: torch.dtype = torch.float32,
    workspace: Workspace | None = None,
) -> LiftExperts:
    """Random weights, random positions with offsets as large, and some that are retired."""
    experts, m, n = shape
    stack = ExpertStack(nn.Parameter(random_weight(experts * m, n).view(shape).to(dtype), False))
    both = random_flat(experts * m, n, int(2 * density * experts * m * n))
    index = SegmentedIndex.from_flat(both[::2].contiguous(), (experts * m, n))
    layer = LiftExperts(stack, StackWeight(stack), index, workspace or Workspace())
    layer.values.data.copy_(torch.randn(index.count, generator=torch.Generator().manual_seed(1)))
    layer.values.data.div_(n**0.5)
    retired = both[1::2].contiguous()
    retire(layer, retired, torch.randn(retired.numel()) / n**0.5)
    return layer


def ends(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@dataclass
class Seen:
    """What a pass gives, and how often the values' gradient came."""

    y: Tensor
    x: Tensor
    values: Tensor
    times: list[Tensor] = field(default_factory=list)


def run(layer: LiftExperts, x: Tensor, grad_y: Tensor, counts: list[int], turned: bool) -> Seen:
    """As a family does it: through torch's own grouped product."""
    times: list[Tensor] = []
    x = x.clone().requires_grad_()
    hook = layer.values.register_post_accumulate_grad_hook(lambda v: times.append(v.grad))
    layer.values.grad = None
    y = F.grouped_mm(x, layer.transpose(-2, -1) if turned else layer, offs=ends(counts))
    y.backward(grad_y)
    hook.remove()
    assert x.grad is not None
    assert layer.values.grad is not None
    return Seen(y.detach(), x.grad, layer.values.grad, times)


def plain(
    layer: LiftExperts,
    x: Tensor,
    grad_y: Tensor,
    counts: list[int],
    turned: bool,
    dtype: torch.dtype,
) -> Seen:
    """The same with dense matrices in `dtype`."""
    rows, _ = layer.weight_tiles.shape
    effective = layer.weight_tiles.rows(0, rows).double().clone()
    for store in layer.learned.stores:
        effective.view(-1)[store.index.to_flat()] += store.values.double() * store.scale
    weight = effective.to(dtype).view(layer.shape).requires_grad_()
    x = x.to(dtype).requires_grad_()
    parts = zip(x.split(counts), weight, strict=True)
    y = torch.cat([part @ (w.T if turned else w) for part, w in parts])
    y.backward(grad_y.to(dtype))
    assert x.grad is not None
    dense = torch.zeros_like(weight) if weight.grad is None else weight.grad
    return Seen(y.detach(), x.grad, dense.reshape(-1)[layer.index.to_flat()] * layer.scale)


def inputs(
    layer: LiftExperts, counts: list[int], turned: bool, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    _, m, n = layer.shape
    wide, narrow = (n, m) if turned else (m, n)
    return torch.randn(sum(counts), wide).to(dtype), torch.randn(sum(counts), narrow).to(dtype)


def assert_right(ours: Seen, layer: LiftExperts, x: Tensor, grad_y: Tensor, counts: list[int],
                 turned: bool) -> None:  # fmt: skip
    truth = plain(layer, x, grad_y, counts, turned, torch.float64)
    usual = plain(layer, x, grad_y, counts, turned, x.dtype)
    for part in ("y", "x", "values"):
        wanted = getattr(truth, part)
        if not wanted.numel() or not wanted.abs().max():
            assert not getattr(ours, part).any(), part
            continue
        error = relative_error(getattr(ours, part), wanted)
        allowed = 2 * relative_error(getattr(usual, part), wanted)
        assert error <= allowed + 0.1 * torch.finfo(x.dtype).eps, part


@each_shape
@each_hit
@each_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_output_and_gradients_are_those_of_a_matrix_per_expert(
    shape: tuple[int, int, int], hit: Callable[[int], list[int]], turned: bool, dtype: torch.dtype
) -> None:
    layer, counts = make_experts(shape, dtype=dtype), hit(shape[0])
    x, grad_y = inputs(layer, counts, turned, dtype)
    ours = run(layer, x, grad_y, counts, turned)
    assert_right(ours, layer, x, grad_y, counts, turned)
    assert len(ours.times) == 1
    assert ours.y.dtype == dtype


def test_entries_of_experts_without_tokens_have_no_gradient() -> None:
    layer = make_experts((4, 64, 48))
    x, grad_y = inputs(layer, [0, 5, 0, 3], turned=True)
    gradient = run(layer, x, grad_y, [0, 5, 0, 3], turned=True).values
    for expert, hit in enumerate((False, True, False, True)):
        first, last = layer.index.span(64 * expert, 64 * (expert + 1))
        assert bool(gradient[first:last].any()) == hit
        assert bool((gradient[first:last] != 0).all()) == hit


def test_several_tiles_give_what_one_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, counts = make_experts((3, 200, 48)), [4, 0, 5]
    x, grad_y = inputs(layer, counts, turned=True)
    whole = run(layer, x, grad_y, counts, turned=True)
    monkeypatch.setattr("leanlift.layers.frozen.tile_rows", lambda *_: 64)
    monkeypatch.setattr("leanlift.layers.gradient_rows.tile_rows", lambda *_: 64)
    tiled = run(layer, x, grad_y, counts, turned=True)
    assert torch.equal(tiled.y, whole.y)
    torch.testing.assert_close(tiled.values, whole.values)


def test_all_experts_may_have_as_many_tokens_in_a_batched_product() -> None:
    layer = make_experts((3, 40, 24))
    x, grad_y = torch.randn(3, 5, 40), torch.randn(3, 5, 24)
    layer.values.grad = None
    x.requires_grad_()
    y = torch.bmm(x, layer)
    y.backward(grad_y)
    assert x.grad is not None
    assert layer.values.grad is not None
    ours = Seen(y.detach().flatten(0, 1), x.grad.flatten(0, 1), layer.values.grad)
    assert_right(ours, layer, x.detach().flatten(0, 1), grad_y.flatten(0, 1), [5] * 3, False)


def test_a_scale_counts_in_both_directions() -> None:
    layer, counts = make_experts((3, 40, 24)), [2, 0, 3]
    layer.scale = 0.25
    x, grad_y = inputs(layer, counts, turned=True)
    assert_right(run(layer, x, grad_y, counts, True), layer, x, grad_y, counts, True)


def test_autocast_decides_the_dtype_of_the_computation() -> None:
    layer, counts = make_experts((3, 40, 24)), [2, 1, 3]
    x, _ = inputs(layer, counts, turned=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.grouped_mm(x, layer.transpose(-2, -1), offs=ends(counts))
    assert y.dtype == torch.bfloat16
    usual = F.grouped_mm(x, layer.transpose(-2, -1), offs=ends(counts)).detach()
    assert relative_error(y, usual.double()) < 2e-2


def made(layer: FrozenExperts, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The experts whose weights are made, as they are."""
    found: list[int] = []
    original = layer.effective_rows

    def counted(first: int, last: int, dtype: torch.dtype) -> Tensor:
        found.append(first // layer.matrix_shape[0])
        return original(first, last, dtype)

    monkeypatch.setattr(layer, "effective_rows", counted)
    return found


def test_only_experts_that_are_hit_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace()
    layer = make_experts((6, 32, 16), workspace=workspace)
    found = made(layer, monkeypatch)
    counts = [0, 3, 0, 0, 1, 0]
    x, grad_y = inputs(layer, counts, turned=True)
    run(layer, x, grad_y, counts, turned=True)
    assert found == [1, 4, 1, 4]  # forwards, then for the gradient of x
    assert workspace.scratch.nbytes == 4 * 32 * 16


def test_autograd_keeps_the_tokens_and_nothing_dense() -> None:
    layer, counts, kept = make_experts((6, 32, 16)), [4, 0, 3, 0, 0, 0], []
    x, _ = inputs(layer, counts, turned=True)

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.grouped_mm(x.requires_grad_(), layer.transpose(-2, -1), offs=ends(counts))
    assert kept == [x.nbytes]


def test_checkpointing_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace()
    up = make_experts((4, 48, 32), workspace=workspace)
    down = make_experts((4, 32, 48), workspace=workspace)
    offs = ends([5, 0, 2, 4])

    def block(x: Tensor) -> Tensor:
        hidden = F.gelu(F.grouped_mm(x, up.transpose(-2, -1), offs=offs))
        return F.grouped_mm(hidden, down.transpose(-2, -1), offs=offs)

    def gradients(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        x = torch.randn(11, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()
        up.values.grad = down.values.grad = None
        forward(x).square().sum().backward()
        return [x.grad, up.values.grad, down.values.grad]  # type: ignore[list-item]

    wanted = gradients(block)
    found = made(down, monkeypatch)
    again = gradients(lambda x: checkpoint(block, x, use_reentrant=False))
    assert all(torch.equal(a, b) for a, b in zip(again, wanted, strict=True))
    assert len(found) == 2 * 3  # the product whose output nobody needs is not repeated


def test_a_change_between_forward_and_backward_is_an_error() -> None:
    layer, counts = make_experts((2, 16, 16)), [2, 2]
    x, grad_y = inputs(layer, counts, turned=True)
    y = F.grouped_mm(x, layer.transpose(-2, -1), offs=ends(counts))
    with torch.no_grad():
        layer.values.add_(1)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        y.backward(grad_y)


OTHERWISE: dict[str, Callable[[LiftExperts, Tensor], object]] = {
    "one taken out": lambda layer, x: F.linear(x, layer[0]),  # type: ignore[arg-type]
    "several taken out": lambda layer, x: layer[torch.tensor([0, 1])],
    "called": lambda layer, x: layer(x),
    "a plain product": lambda layer, x: x @ layer,  # type: ignore[operator]
    "a sum": lambda layer, x: torch.add(x, layer),  # type: ignore[arg-type]
    "stacked otherwise": lambda layer, x: layer.transpose(0, 1),
    "first factor": lambda layer, x: torch.bmm(layer, x),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("use", OTHERWISE.values(), ids=OTHERWISE.keys())
def test_another_use_is_an_error_that_says_what_to_do(
    use: Callable[[LiftExperts, Tensor], object],
) -> None:
    with pytest.raises(RuntimeError, match='experts_implementation="grouped_mm"'):
        use(make_experts((2, 16, 16)), torch.randn(3, 16))


def test_an_input_of_another_width_is_an_error() -> None:
    layer = make_experts((2, 16, 24))
    with pytest.raises(ValueError, match=r"expected \[S, 24\], got \(3, 16\)"):
        F.grouped_mm(torch.randn(3, 16), layer.transpose(-2, -1), offs=ends([1, 2]))


def test_it_shows_what_the_parameter_showed() -> None:
    layer = make_experts((2, 16, 24), dtype=torch.bfloat16)
    weight = layer.base.weight
    assert (layer.shape, layer.dtype, layer.device) == (weight.shape, weight.dtype, weight.device)
    turned = layer.transpose(1, 2)
    assert (turned.dtype, turned.device) == (weight.dtype, weight.device)


@each_way
def test_an_observer_can_form_the_dense_gradient(turned: bool) -> None:
    lift, counts = make_experts((3, 20, 24)), [4, 0, 2]
    frozen = FrozenExperts(lift.base, lift.weight_tiles, Workspace())
    found = torch.zeros(60, 24)

    def observer(x: Tensor, grad_y: Tensor, first: int = 0) -> None:
        found[first : first + grad_y.shape[1]] += grad_y.T @ x

    frozen.observer = observer
    x, grad_y = inputs(lift, counts, turned)
    F.grouped_mm(x, frozen.transpose(1, 2) if turned else frozen, offs=ends(counts)).backward(
        grad_y
    )
    wanted = torch.zeros(3, 20, 24)
    for expert, (a, g) in enumerate(zip(x.split(counts), grad_y.split(counts), strict=True)):
        wanted[expert] = g.T @ a if turned else a.T @ g
    torch.testing.assert_close(found, wanted.view(60, 24))
