"""The kernels against the torch reference and a float64 truth, in Triton's interpreter.

Run by `test_kernels.py` in a process of its own: the interpreter is chosen when Triton is
imported. Its bfloat16 is wrong (casts cut off), so dtypes here are fp32 and fp16. A kernel's error
against the truth may be at most plain torch's plus a hundredth of an epsilon.
"""

from __future__ import annotations

import pytest
import torch
from helpers import (
    assert_as_good_as_plain_torch,
    effective_oracle,
    make_base,
    make_dense,
    make_linear4bit,
    random_flat,
    random_inputs,
    relative_error,
    retire,
)
from sweeps import swept
from torch import nn

from leanlift import UserError
from leanlift.layers import LiftLinear, Workspace
from leanlift.ops import tile_ops
from leanlift.optim import SparseAdamW
from leanlift.sparse import SegmentedIndex
from leanlift.weights.bnb import moment_table
from leanlift.weights.quantized import frozen_weight

pytestmark = pytest.mark.filterwarnings(  # of Triton's interpreter, which asks numpy for scalars
    "ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"
)
CPU = torch.device("cpu")
SHAPES = [(4, 512), (9, 48), (5, 257), (3, 1100), (3, 1)]
BASES = {
    "nf4": lambda m, n: make_linear4bit(m, n, double=False),
    "nf4+double": make_linear4bit,
    "nf4/128+double": lambda m, n: make_linear4bit(m, n, blocksize=128),
    "nf4/4096": lambda m, n: make_linear4bit(m, n, blocksize=4096, double=False),
    "fp4": lambda m, n: make_linear4bit(m, n, "fp4", double=False),
    "fp4+double": lambda m, n: make_linear4bit(m, n, "fp4"),
    "nf4+double of fp16": lambda m, n: make_linear4bit(m, n, dtype=torch.float16),
    "int8": lambda m, n: make_base("int8", m, n),
    "fp32": make_dense,
    "fp16": lambda m, n: make_dense(m, n, torch.float16),
}

each_base = pytest.mark.parametrize("kind", BASES)
each_shape = pytest.mark.parametrize(
    "shape",
    swept(SHAPES, (3, 1100), whole=True),
    ids=lambda shape: "x".join(map(str, shape)),
)
each_dtype = pytest.mark.parametrize(
    "dtype", swept([torch.float32, torch.float16], torch.float32), ids=str
)


def layer_on(base: nn.Linear, active: torch.Tensor, retired: torch.Tensor) -> LiftLinear:
    """A layer with random offsets at these positions."""
    weight = frozen_weight(base)
    index = SegmentedIndex.from_flat(active, weight.shape)
    lift = LiftLinear(base, weight, index, Workspace("triton"))
    lift.values.data.normal_(std=0.2)
    retire(lift, retired, 0.2 * torch.randn(retired.numel()))
    return lift


def split(m: int, n: int, active: float, retired: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Disjoint random positions, as shares of the matrix."""
    order = torch.randperm(m * n, generator=torch.Generator().manual_seed(3))
    first = int(active * m * n)
    last = first + int(retired * m * n)
    return order[:first].sort().values, order[first:last].sort().values


@each_base
@each_shape
@each_dtype
def test_effective_weights_are_the_references(
    kind: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    lift = layer_on(BASES[kind](*shape), *split(*shape, 0.1, 0.05))
    ours = lift.effective_weight(dtype).clone()
    lift.workspace.use("torch")
    reference = lift.effective_weight(dtype)
    truth = effective_oracle(lift)
    epsilon = torch.finfo(dtype).eps
    assert relative_error(ours, truth) <= relative_error(reference, truth) + epsilon / 100
    assert torch.equal(ours, reference)


@pytest.mark.parametrize(
    ("active", "retired"), swept([(0, 0), (1, 0), (0.5, 0.5), (0, 1), (0.9, 0.02)], (0, 0))
)
def test_empty_and_full_masks(active: float, retired: float) -> None:
    lift = layer_on(make_linear4bit(20, 600), *split(20, 600, active, retired))
    ours = lift.effective_weight(torch.float32).clone()
    lift.workspace.use("torch")
    assert torch.equal(ours, lift.effective_weight(torch.float32))


def test_rows_of_more_segments_than_a_thread_holds() -> None:
    lift = layer_on(make_linear4bit(2, 17_024), *split(2, 17_024, 0.02, 0.01))
    ours = lift.effective_weight(torch.float32).clone()
    gathered = torch.empty(lift.index.count)
    tile_ops("triton", CPU).gather(ours, lift.index, gathered)
    assert torch.equal(gathered, ours.view(-1)[lift.index.to_flat()])
    lift.workspace.use("torch")
    assert torch.equal(ours, lift.effective_weight(torch.float32))


def test_rows_in_the_middle_with_a_scale_and_a_crowded_row() -> None:
    flat = torch.cat([torch.arange(270 * 64, 270 * 65), 270 * 66 + torch.arange(0, 270, 7)])
    lift = layer_on(make_linear4bit(130, 270), flat, torch.tensor([270 * 64 - 1, 270 * 65]))
    lift.scale = 0.37
    outputs = []
    for name in ("triton", "torch"):
        outputs.append(torch.empty(66, 270))
        rows = lift.offsets(64, 130)
        tile_ops(name, CPU).effective_rows(lift.weight_tiles, rows, 64, 130, outputs[-1])
    assert torch.equal(*outputs)


@each_shape
@each_dtype
@pytest.mark.parametrize("density", [0, 0.05, 1])
def test_gathered_entries_are_the_references(
    shape: tuple[int, int], dtype: torch.dtype, density: float
) -> None:
    flat = random_flat(*shape, int(density * shape[0] * shape[1]))
    part = SegmentedIndex.from_flat(flat, shape).part(0, shape[0])
    dense, out = torch.randn(shape).to(dtype), torch.full((flat.numel(),), torch.nan)
    tile_ops("triton", CPU).gather(dense, part, out)
    assert torch.equal(out, dense.view(-1)[flat].float())


@pytest.mark.parametrize("kind", swept(["nf4+double", "int8", "fp32"], "nf4+double"))
@each_dtype
def test_a_layer_trains_as_well_as_plain_torch(kind: str, dtype: torch.dtype) -> None:
    lift = layer_on(BASES[kind](20, 300), *split(20, 300, 0.1, 0.05))
    assert_as_good_as_plain_torch(lift, *random_inputs(lift, dtype=dtype))


def test_bfloat16_values_are_read() -> None:
    lift = layer_on(make_linear4bit(20, 300), *split(20, 300, 0.1, 0))
    lift.values = nn.Parameter(lift.values.data.bfloat16())
    ours = lift.effective_weight(torch.float32).clone()
    lift.workspace.use("torch")
    assert torch.equal(ours, lift.effective_weight(torch.float32))


def test_names_are_checked() -> None:
    with pytest.raises(
        UserError, match="expected ops among auto, torch, triton, triton-strips, got"
    ):
        tile_ops("cuda", CPU)
    assert tile_ops("auto", CPU).name == "torch"


def optimizer_pair(
    count: int, moments: str, dtype: torch.dtype = torch.float32, **options: object
) -> list[tuple[nn.Parameter, SparseAdamW]]:
    """The same vector under both implementations."""
    start = torch.randn(count)
    pair = []
    for ops in ("triton", "torch"):
        parameter = nn.Parameter(start.to(dtype))
        pair.append(
            (parameter, SparseAdamW([parameter], lr=1e-2, moments=moments, ops=ops, **options))
        )
    return pair


def steps(pair: list[tuple[nn.Parameter, SparseAdamW]], count: int) -> nn.Parameter:
    """Step both, and torch's own AdamW in fp64, whose parameter is returned."""
    truth = nn.Parameter(pair[0][0].detach().double())
    group = pair[0][1].param_groups[0]
    names = ("lr", "betas", "eps", "weight_decay")
    exact = torch.optim.AdamW([truth], **{name: group[name] for name in names})
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        grad = torch.randn(truth.numel(), generator=generator)
        grad[::50] = 0  # moments that stay exact zeros
        truth.grad = grad.double()
        exact.step()
        for parameter, optimizer in pair:
            parameter.grad = grad.to(parameter.dtype)
            optimizer.step()
    return truth


@pytest.mark.parametrize("count", [1, 256, 1500])
@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_an_optimizer_step_is_as_exact_as_the_references(count: int, moments: str) -> None:
    pair = optimizer_pair(count, moments, weight_decay=0.1)
    truth = steps(pair, 4)
    ours, reference = (relative_error(parameter, truth.detach()) for parameter, _ in pair)
    assert ours <= 1.05 * reference + 1e-7
    state, other = (optimizer.state[parameter] for parameter, optimizer in pair)
    for name, held in state.items():
        if held.dtype == torch.uint8:  # bitsandbytes' CPU quantizer is not exact near zero
            assert float((held != other[name]).float().mean()) < 0.02
            assert torch.equal(held == 0, other[name] == 0)
        else:
            torch.testing.assert_close(held, other[name], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_a_step_that_the_device_forbids_changes_nothing(moments: str) -> None:
    pair = optimizer_pair(600, moments)
    steps(pair, 2)
    for parameter, optimizer in pair:
        state = optimizer.state[parameter]
        held = [parameter.detach(), *(state[name] for name in state if name != "step")]
        before = [tensor.clone() for tensor in held]
        parameter.grad = torch.full((600,), float("nan"))
        optimizer.step_parameter(parameter, torch.tensor(False))
        assert all(torch.equal(a, b) for a, b in zip(held, before, strict=True))
        assert float(state["step"]) == 3
        optimizer.uncount_step(parameter)
        assert float(state["step"]) == 2
        parameter.grad = torch.ones(600)
        optimizer.step_parameter(parameter, torch.tensor(True))
        assert not torch.equal(parameter.detach(), before[0])


def test_8bit_moments_take_the_nearest_code() -> None:
    parameter, optimizer = optimizer_pair(2000, "8bit")[0]
    parameter.grad = torch.randn(2000)
    parameter.grad[::50] = 0
    optimizer.step()
    state, beta = optimizer.state[parameter], optimizer.param_groups[0]["betas"]
    exact = {"exp_avg": (1 - beta[0]) * parameter.grad, "exp_avg_sq": parameter.grad**2}
    exact["exp_avg_sq"] *= 1 - beta[1]
    for name, moment in exact.items():
        table = moment_table(CPU, signed=name == "exp_avg")
        scale = state[f"{name}_absmax"].repeat_interleave(256)[:2000]
        got = (table[state[f"{name}_codes"].long()] * scale - moment).abs()
        best = (table[:, None] * scale - moment).abs().min(0).values
        tiny = (moment != 0) & (moment / scale < table[1] / 2) & (name == "exp_avg_sq")
        assert bool((got <= best * (1 + 1e-4) + 1e-9)[~tiny].all())
        assert bool((state[f"{name}_codes"][tiny] == 1).all())  # never stored as zero


@pytest.mark.parametrize("moments", ["float32", "8bit"])
def test_newcomers_are_clamped(moments: str) -> None:
    pair = optimizer_pair(600, moments)
    steps(pair, 3)
    for parameter, optimizer in pair:
        before = parameter.detach().clone()
        parameter.grad = torch.full((600,), 50.0)  # entries 0, 50, ... have had no gradient yet
        optimizer.step()
        assert float((parameter.detach() - before).abs()[::50].max()) <= 1e-2 * 1.001


def test_bfloat16_values_are_rounded_to_a_neighbour_without_bias() -> None:
    pair = optimizer_pair(4096, "float32", torch.bfloat16, betas=(0.0, 0.0), eps=0.0)
    for parameter, optimizer in pair:
        parameter.data.fill_(1.0)
        parameter.grad = torch.full_like(parameter, -1.0)
        optimizer.param_groups[0]["lr"] = 2**-9  # a quarter of the way to 1 + 2^-7
        optimizer.step()
        assert set(parameter.detach().float().unique().tolist()) == {1.0, 1 + 2**-7}
        share = float((parameter > 1).float().mean())
        assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4096) ** 0.5
    again = optimizer_pair(4096, "float32", torch.bfloat16, betas=(0.0, 0.0), eps=0.0)[0]
    again[0].data.fill_(1.0)
    again[0].grad = torch.full_like(again[0], -1.0)
    again[1].param_groups[0]["lr"] = 2**-9
    again[1].step()
    assert torch.equal(again[0], pair[0][0])
