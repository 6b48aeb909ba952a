"""Small weights of every kind, and the plain oracles that the tests compare with.

Shapes: W [m, n] is out_features x in_features; `flat` positions are row * n + column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from hypothesis import settings
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from leanlift.layers import LiftLinear, Workspace
from leanlift.sparse import LayerOffsets, Offsets, SegmentedIndex
from leanlift.weights.quantized import frozen_weight


def examples(count: int) -> settings:
    """Hypothesis settings: the same `count` examples on every run, whatever the machine's speed."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a float tensor: -0.0 differs from 0.0, and a NaN equals itself."""
    widths = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(widths[tensor.element_size()])


def random_weight(m: int, n: int, seed: int = 0) -> Tensor:
    """fp32 Gaussian entries of the size that a Linear starts with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator) / n**0.5


def make_linear4bit(
    m: int,
    n: int,
    quant_type: str = "nf4",
    double: bool = True,
    blocksize: int = 64,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    weight: Tensor | None = None,
) -> Linear4bit:
    """A quantized `Linear4bit` on the CPU; `weight` is random where none is given."""
    weight = random_weight(m, n) if weight is None else weight
    module = Linear4bit(n, m, bias=bias, compute_dtype=dtype, quant_type=quant_type)
    module.weight = Params4bit(
        weight.to(dtype),
        requires_grad=False,
        quant_type=quant_type,
        compress_statistics=double,
        blocksize=blocksize,
        module=module,
    ).to("cpu")
    _set_bias(module, dtype)
    return module


def make_linear8bit(
    m: int, n: int, bias: bool = False, weight: Tensor | None = None
) -> Linear8bitLt:
    """A quantized `Linear8bitLt` on the CPU."""
    weight = random_weight(m, n) if weight is None else weight
    module = Linear8bitLt(n, m, bias=bias, has_fp16_weights=False)
    module.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False).to("cpu")
    _set_bias(module, torch.float32)
    return module


def make_dense(m: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = False) -> nn.Linear:
    """A plain frozen `nn.Linear`."""
    module = nn.Linear(n, m, bias=bias)
    module.weight = nn.Parameter(random_weight(m, n).to(dtype), requires_grad=False)
    _set_bias(module, dtype)
    return module


def _set_bias(module: nn.Linear, dtype: torch.dtype) -> None:
    if module.bias is not None:
        bias = torch.randn(module.out_features, generator=torch.Generator().manual_seed(5))
        module.bias = nn.Parameter(bias.to(dtype), requires_grad=False)


def make_base(
    kind: str, m: int, n: int, dtype: torch.dtype = torch.float32, bias: bool = False
) -> nn.Linear:
    """kind: "nf4", "int8" or "dense"."""
    if kind == "nf4":
        return make_linear4bit(m, n, dtype=dtype, bias=bias)
    return make_linear8bit(m, n, bias) if kind == "int8" else make_dense(m, n, dtype, bias)


def random_flat(m: int, n: int, count: int, seed: int = 0) -> Tensor:
    """`count` sorted distinct positions."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(m * n, generator=generator)[:count].sort().values


def make_lift(
    base: nn.Linear, density: float = 0.05, workspace: Workspace | None = None, seed: int = 0
) -> LiftLinear:
    """A LiftLinear at random positions, with random offsets as large as the weights."""
    weight = frozen_weight(base)
    m, n = weight.shape
    index = SegmentedIndex.from_flat(random_flat(m, n, int(density * m * n), seed), (m, n))
    lift = LiftLinear(base, weight, index, Workspace() if workspace is None else workspace)
    offsets = torch.randn(index.count, generator=torch.Generator().manual_seed(seed + 1))
    lift.values.data.copy_(offsets / n**0.5)
    return lift


def retire(lift: LiftLinear, flat: Tensor, values: Tensor) -> None:
    """Let `values` at positions `flat`, and no others, be retired."""
    retired = Offsets.from_flat(flat, values, lift.index.shape)
    lift.put(LayerOffsets(lift.learned.active, retired))


def retired_flat(lift: LiftLinear) -> Tensor:
    """The positions that are retired, sorted."""
    retired = lift.learned.retired
    return torch.empty(0, dtype=torch.int64) if retired is None else retired.index.to_flat()


def make_block(workspace: Workspace, seed: int = 0) -> nn.Sequential:
    """48 -> 96 -> 48 with a GELU between."""
    up = make_lift(make_linear4bit(96, 48), workspace=workspace, seed=seed)
    return nn.Sequential(up, nn.GELU(), make_lift(make_linear4bit(48, 96), workspace=workspace))


def random_inputs(
    lift: LiftLinear, leading: tuple[int, ...] = (5,), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """x [*leading, n] and grad_y [*leading, m]."""
    x = torch.randn(*leading, lift.in_features).to(dtype)
    return x, torch.randn(*leading, lift.out_features).to(dtype)


def effective_oracle(lift: LiftLinear) -> Tensor:
    """D(Q) + retired + active offsets, dense, in fp64."""
    dense = lift.weight_tiles.rows(0, lift.out_features).double().clone().view(-1)
    dense[lift.index.to_flat()] += lift.values.detach().double()
    if lift.retired_index is not None and lift.retired_values is not None:
        dense[lift.retired_index.to_flat()] += lift.retired_values.double()
    return dense.view(lift.out_features, lift.in_features)


def trained_like(
    m: int, n: int, seed: int = 0, exponent: float = 0.5, noise: float = 0.5
) -> Tensor:
    """An fp32 matrix with the features of a trained one: singular values that fall like
    i^-exponent, over a bulk of noise, with heavy-tailed scales of rows and columns."""
    generator = torch.Generator().manual_seed(seed)

    def gaussian(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    side = min(m, n)
    left = torch.linalg.qr(gaussian(m, side)).Q
    right = torch.linalg.qr(gaussian(n, side)).Q
    sigma = torch.arange(1, side + 1, dtype=torch.float64) ** -exponent
    weight = (left * sigma) @ right.T
    weight = weight / weight.std() + noise * gaussian(m, n)
    return (weight * (0.4 * gaussian(m, 1)).exp() * (0.4 * gaussian(n)).exp()).float()


def low_rank_oracle(weight: Tensor, rank: int) -> Tensor:
    """The best rank-R approximation [m, n] from a float64 SVD."""
    left, sigma, right = torch.linalg.svd(weight.double(), full_matrices=False)
    return (left[:, :rank] * sigma[:rank]) @ right[:rank]


def top_oracle(scores: Tensor, count: int) -> Tensor:
    """Sorted positions of the `count` largest scores; ties go to the lower position."""
    order = torch.sort(scores.reshape(-1), descending=True, stable=True).indices
    return order[:count].sort().values


def principal_oracle(weight: Tensor, rank: int, count: int) -> Tensor:
    """The principal weights, from a float64 SVD."""
    return top_oracle(low_rank_oracle(weight, rank).abs(), count)


def overlap(mask: Tensor, reference: Tensor) -> float:
    """Share of the positions `reference` that are in `mask`."""
    return float(torch.isin(reference, mask).float().mean())


def relative_error(got: Tensor, truth: Tensor) -> float:
    """|got - truth| / |truth| in the Frobenius norm, in fp64."""
    return float((got.detach().double() - truth).norm() / truth.norm().clamp_min(1e-300))


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass: y, and the gradients of x and of the trained entries."""

    y: Tensor
    x: Tensor
    values: Tensor

    def errors(self, truth: Pass) -> dict[str, float]:
        pairs = {
            "y": (self.y, truth.y),
            "x": (self.x, truth.x),
            "values": (self.values, truth.values),
        }
        return {name: relative_error(got, want) for name, (got, want) in pairs.items()}


def run_pass(lift: LiftLinear, x: Tensor, grad_y: Tensor, autocast: bool = False) -> Pass:
    """A pass through `lift`; x [..., n] and grad_y [..., m]."""
    x = x.detach().clone().requires_grad_()
    lift.values.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = lift(x)
    y.backward(grad_y.to(y.dtype))
    assert x.grad is not None
    assert lift.values.grad is not None
    return Pass(y.detach(), x.grad, lift.values.grad)


def plain_pass(
    lift: LiftLinear, x: Tensor, grad_y: Tensor, dtype: torch.dtype, autocast: bool = False
) -> Pass:
    """The same pass through a plain Linear whose weight is the effective one in `dtype`."""
    linear = nn.Linear(lift.in_features, lift.out_features, bias=lift.bias is not None)
    linear.weight = nn.Parameter(effective_oracle(lift).to(dtype))
    if lift.bias is not None:
        linear.bias = nn.Parameter(lift.bias.detach().to(dtype), requires_grad=False)
    x = x.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear(x)
    y.backward(grad_y.to(y.dtype))
    assert x.grad is not None
    assert linear.weight.grad is not None
    return Pass(y.detach(), x.grad, linear.weight.grad.view(-1)[lift.index.to_flat()])


def pass_by_rows(lift: LiftLinear, x: Tensor, grad_y: Tensor, step: int = 512) -> Pass:
    """The same pass without bias in fp64, `step` rows of the weight at a time; x [T, n]."""
    (m, n), flat, wide = lift.weight_tiles.shape, lift.index.to_flat(), x.double()
    y, grad_x, grad_values = [], torch.zeros_like(wide), []
    for start in range(0, m, step):
        inside = (flat >= start * n) & (flat < (start + step) * n)
        entries, grad = flat[inside] - start * n, grad_y[:, start : start + step].double()
        dense = lift.weight_tiles.rows(start, min(start + step, m)).double()
        dense.view(-1)[entries] += lift.values.detach()[inside].double()
        y.append(wide @ dense.T)
        grad_x += grad @ dense
        grad_values.append((grad.T @ wide).view(-1)[entries])
    return Pass(torch.cat(y, 1), grad_x, torch.cat(grad_values))


def assert_as_good_as_plain_torch(
    lift: LiftLinear, x: Tensor, grad_y: Tensor, autocast: bool = False
) -> Pass:
    """The error against fp64 is at most twice that of plain torch plus a tenth of an epsilon."""
    truth = plain_pass(lift, x, grad_y, torch.float64)
    plain = plain_pass(lift, x, grad_y, x.dtype, autocast).errors(truth)
    ours = run_pass(lift, x, grad_y, autocast)
    band = torch.finfo(ours.y.dtype).eps / 10
    for name, error in ours.errors(truth).items():
        assert error <= 2 * plain[name] + band, f"{name}: {error:.2e}, plain {plain[name]:.2e}"
    return ours


def saved_nbytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that autograd keeps between forward and backward."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x)
    return sum(storages.values())


class LargestTensor(TorchDispatchMode):
    """Records the largest tensor, in entries, that any operation returns in new memory."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.numel = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.itemsize)
        return out
