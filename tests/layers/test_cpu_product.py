"""Products by tiles of rows on a CPU, and in fp32 where it has none in 16 bits."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from helpers import make_base, make_lift, make_linear4bit
from torch import Tensor, nn

from leanlift.layers import FrozenLinear, LiftLinear, Workspace, cpu_product
from leanlift.layers.cpu_product import FEW, part_of, times, times_turned
from leanlift.measure import LiveBytes
from leanlift.weights.quantized import WeightDense


def by_tiles(factor: Tensor, weight: Tensor, turned: bool, bias: Tensor | None = None) -> Tensor:
    """What is written to a tensor that holds NaN before."""
    width = weight.shape[0 if turned else 1]
    out = factor.new_full((*factor.shape[:-1], width), torch.nan)
    rows = lambda start, stop: weight[start:stop]  # noqa: E731
    if turned:
        times_turned(factor, rows, out, bias)
    else:
        times(factor, rows, out)
    return out


@pytest.fixture(params=[True, False], ids=["products", "none in 16 bits"])
def has(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    wide = (torch.float32, torch.float64)
    answer: bool = request.param
    monkeypatch.setattr(cpu_product, "has_products", lambda dtype: answer or dtype in wide)
    return answer


@pytest.fixture(params=[64, 512], ids=["tiles", "one tile"])
def tiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_product, "tile_rows", lambda *_: request.param)
    monkeypatch.setattr(cpu_product, "TOKENS", 4)


@pytest.mark.usefixtures("has", "tiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (), (0,)], ids=str)
@pytest.mark.parametrize("way", ["turned", "turned with bias", "as it lies"])
def test_it_is_the_product(shape: tuple[int, ...], dtype: torch.dtype, way: str) -> None:
    turned = way != "as it lies"
    weight, bias = torch.randn(200, 40).to(dtype), torch.randn(200).to(dtype)
    factor = torch.randn(*shape, 40 if turned else 200).to(dtype)
    if factor.ndim == 3:
        factor = factor.transpose(0, 1)  # not in rows
    added = bias if way == "turned with bias" else None
    found = by_tiles(factor, weight, turned, added)
    assert found.dtype == dtype
    exact = weight.double().T if turned else weight.double()
    more = 0.0 if added is None else added.double()
    wanted = factor.double() @ exact + more
    bound = factor.double().abs() @ exact.abs() + torch.as_tensor(more).abs()
    assert found.shape == wanted.shape
    tolerance = 2 if dtype.itemsize == 2 else 40  # roundings of a sum in the dtype itself
    assert ((found.double() - wanted).abs() <= tolerance * torch.finfo(dtype).eps * bound).all()


@pytest.mark.usefixtures("has", "tiled")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_it_is_added_to_what_is_there(dtype: torch.dtype) -> None:
    weight, grad_y = torch.randn(200, 64, dtype=dtype), torch.randn(5, 200, dtype=dtype)
    before = torch.randn(5, 64, dtype=torch.promote_types(dtype, torch.float32))
    sums = before.clone()
    times(grad_y, part_of(weight), sums, adds=True)
    found = (sums - before).double() - grad_y.double() @ weight.double()
    # of a CPU's products in 16 bits each is rounded
    limit = 0.5 if dtype == torch.bfloat16 else 1e-4
    assert found.abs().max() < limit


@pytest.mark.usefixtures("tiled")
def test_sums_over_tiles_are_rounded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 and tiles that have a quarter of its smallest part in 16 bits: each by itself is lost."""
    monkeypatch.setattr(cpu_product, "has_products", lambda dtype: dtype != torch.bfloat16)
    rows = 512
    weight = torch.full((rows, 2), torch.finfo(torch.bfloat16).eps / 256).bfloat16()
    weight[0] = 1
    found = by_tiles(torch.ones(1, rows).bfloat16(), weight, turned=False)
    assert torch.equal(found, weight.float().sum(0, keepdim=True).bfloat16())
    assert (found > 1).all()


@pytest.mark.parametrize("way", [times, times_turned])
def test_a_tile_is_gone_before_the_next_is_made(
    way: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_product, "has_products", lambda dtype: dtype != torch.bfloat16)
    monkeypatch.setattr(cpu_product, "tile_rows", lambda *_: 64)
    factor = torch.randn(FEW + 1, 512).bfloat16()
    out = factor.new_empty(FEW + 1, 512)
    rows = lambda start, stop: torch.ones(stop - start, 512, dtype=torch.bfloat16)  # noqa: E731
    with LiveBytes() as live:
        way(factor, rows, out)
    activations = 4 * 4 * factor.numel()
    assert live.peak <= (2 + 4) * 64 * 512 + activations  # as it is made, and widened


@pytest.mark.usefixtures("has")
@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_layer_makes_no_weight_but_a_tile(
    kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many tiles there are, and no more bytes than one of them, widened, beside sums."""
    monkeypatch.setattr(cpu_product, "tile_rows", lambda *_: 64)
    lift, whole = (make_lift(make_base(kind, 640, 512)) for _ in range(2))
    x, tokens = torch.randn(3, 512).to(dtype), 3
    lift(x)  # the scratch is there

    def peak(layer: LiftLinear) -> int:
        with LiveBytes() as live:
            layer.product_back(layer.product(x))
        return live.peak + layer.scratch.nbytes

    own = peak(lift)
    tile, activations = 4 * 64 * 512, 4 * tokens * (640 + 512) * 2
    assert own <= 3 * tile + activations  # as it is stored, as it is computed with, widened
    whole.workspace.stands_for = "cuda"
    whole.product(x)
    assert peak(whole) >= dtype.itemsize * 640 * 512
    close = partial(torch.testing.assert_close, rtol=2e-2, atol=2e-2)
    close(lift.product(x), whole.product(x))
    close(lift.product_back(lift.product(x)), whole.product_back(whole.product(x)))


@pytest.mark.parametrize("tokens", [1, FEW, FEW + 1])
def test_a_few_tokens_widen_no_weight(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is generated would wait for it."""
    monkeypatch.setattr(cpu_product, "has_products", lambda dtype: dtype != torch.bfloat16)
    weight, x = torch.randn(640, 512).bfloat16(), torch.randn(tokens, 512).bfloat16()
    with LiveBytes() as live:
        by_tiles(x, weight, turned=True)
    assert (live.peak >= 4 * weight.numel()) == (tokens > FEW)


@pytest.mark.usefixtures("tiled")
def test_a_weight_that_is_there_is_multiplied_with() -> None:
    lift = make_lift(make_linear4bit(200, 64))
    x = torch.randn(3, 64)
    ones = torch.ones(200, 64)
    torch.testing.assert_close(lift.product(x, ones), x @ ones.T)
    grad_y = torch.randn(3, 200)
    torch.testing.assert_close(lift.product_back(grad_y, ones), grad_y @ ones)


def test_a_gpu_and_its_plan_multiply_with_a_whole_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = lambda *_: pytest.fail("by tiles")  # noqa: E731
    monkeypatch.setattr("leanlift.layers.frozen.times", refused)
    monkeypatch.setattr("leanlift.layers.frozen.times_turned", refused)
    lift = make_lift(make_linear4bit(65, 48))
    lift.workspace.stands_for = "cuda"
    lift(torch.randn(3, 48, requires_grad=True)).sum().backward()


def test_a_brought_linear_multiplies_as_the_stock_one_that_it_stands_for() -> None:
    """A base that is streamed is the same model to the bit, whatever this CPU multiplies with."""
    linear = nn.Linear(48, 96, bias=False, dtype=torch.bfloat16)
    brought = FrozenLinear(linear, WeightDense(linear), Workspace())
    x, grad_y = torch.randn(2, 64, 48).bfloat16(), torch.randn(2, 64, 96).bfloat16()
    assert not brought.multiplies_by_tiles
    gradients = []
    for module in (linear, brought):
        given = x.clone().requires_grad_()
        module(given).backward(grad_y)
        gradients.append(given.grad)
    assert torch.equal(*gradients)
