"""What is between a block's products, by Liger's kernels: norms, rotary embedding, gated products.

Written as torch operations, these go over the same numbers a dozen times: a quarter of what the
kernels of a step took on the H100 that `benchmarks/gpu_proof` ran on. Liger's kernels (https://github.com/linkedin/
Liger-Kernel; Hsu et al., arXiv 2410.10989) go over them once, and keep less for the backward pass.

What is replaced is found by trying, not by a family's name: a norm or a rotary embedding is taken
where, on numbers, it gives what the formula gives that a kernel computes, and left as it is where
it does not. Tensors on a CPU are computed as before, as there is no kernel for them; a plan's,
which have no numbers, are given what the kernels would keep and make.

A backward pass writes the gradients of a gated product over its factors: it can be gone through
once.
"""

from __future__ import annotations

import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from leanlift.errors import UserError
from leanlift.layers.fused_glu import OurForward, fused_glu, may_be_replaced
from leanlift.layers.kept_norms import as_it_does, computes_by
from leanlift.layers.mlp_ways import Way, way_of
from leanlift.layers.untraced import untraced

ROTARY = "apply_rotary_pos_emb"
"""What a family's module calls its rotary embedding."""
_LOCAL = threading.local()


def use_fused_elementwise(model: nn.Module) -> dict[str, int]:
    """Let norms, rotary embeddings and gated MLPs use Liger's kernels, in place;
    `fused_glu.use_stock_glu` gives each module its own forward again.

    Returns:
        How many there are of each: "norms", "rotary", "mlps".
    """
    found = {"norms": 0, "rotary": 0, "mlps": 0}
    for module in model.modules():
        if not may_be_replaced(module):
            continue
        kind: Any = type(module)
        way = way_of(module, fused_kernel_glu)
        if way is not None and way.gated:
            module.forward = OurForward(_mlp_forward, module, way)
            found["mlps"] += 1
        elif _form_of(module) is not None:
            computes_by(module, _norm)
            found["norms"] += 1
        elif _takes_rotary(kind):
            module.forward = OurForward(_attention_forward, module)
            found["rotary"] += 1
    return found


def launches(x: Tensor) -> bool:
    """Whether a kernel can go over a tensor: on a GPU, or in Triton's interpreter. A plan's tensor
    stands for one on a GPU."""
    return x.is_cuda or isinstance(x, FakeTensor) or _interpreted()


@cache
def _interpreted() -> bool:
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret)


def check_kernels(cuda: bool) -> None:
    """Refuse Liger's kernels where they cannot run.

    Args:
        cuda: whether the model is on a GPU.

    Raises:
        UserError: there is no GPU, or the package is not installed.
    """
    if not (cuda or _interpreted()):
        raise UserError(
            "fused_elementwise needs a GPU: Liger's kernels have no form for a CPU. Leave it out."
        )
    try:
        import liger_kernel.ops  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"fused_elementwise needs Liger's kernels ({error}): install leanlift[liger], or leave "
            "it out."
        ) from None


# --- gated products ---------------------------------------------------------------------------


@untraced
def _mlp_forward(mlp: Any, way: Way, x: Tensor) -> Tensor:
    return way(mlp, x)


def fused_kernel_glu(gate: Tensor, up: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """act(gate) * up, both of one shape [..., d], by one kernel where there is one for `act`."""
    of: Any = type(act)
    kind = _kind_of(of)
    if kind is None or not launches(gate):
        return fused_glu(gate, up, act)
    product: Tensor
    if isinstance(gate, FakeTensor):
        product = _GluStandIn.apply(gate, up)
    elif kind == "silu":
        from liger_kernel.ops import LigerSiLUMulFunction

        product = LigerSiLUMulFunction.apply(gate, up)
    else:
        from liger_kernel.ops import LigerGELUMulFunction

        product = LigerGELUMulFunction.apply(gate, up)
    return product


@cache
def _kind_of(act: Any) -> str | None:
    """Which kernel computes an activation of a class: "silu", "gelu" (by tanh); None: none does."""
    try:
        with _disable_current_modes(), torch.no_grad():
            numbers = torch.linspace(-6, 6, 97, device="cpu")
            found = act()(numbers)
            if torch.equal(found, nn.functional.silu(numbers)):
                return "silu"
            tanh = nn.functional.gelu(numbers, approximate="tanh")
            return "gelu" if torch.equal(found, tanh) else None
    except Exception:  # it is made or called in another way
        return None


class _GluStandIn(torch.autograd.Function):
    """What a plan sees of the kernel: keeps both factors, and writes their gradients over them."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad.contiguous()
        gate, up = ctx.saved_tensors
        return gate, up


# --- norms ------------------------------------------------------------------------------------


def _norm(norm: Any, x: Tensor) -> Tensor:
    form = _form_of(norm)
    y: Tensor
    if form is None or not _fits(norm.weight, x):
        y = as_it_does(norm, x)
    elif isinstance(x, FakeTensor):
        y = _NormStandIn.apply(x)
    else:
        from liger_kernel.ops import LigerRMSNormFunction

        offset, casting = form
        # not in place: the gradient that comes in may be a residual's too
        y = LigerRMSNormFunction.apply(
            x, norm.weight, float(getattr(norm, _eps_of(norm))), offset, casting, False, None
        )
    return y


def _fits(weight: Tensor, x: Tensor) -> bool:
    return launches(x) and x.shape[-1:] == weight.shape and x.dtype == weight.dtype


def _form_of(module: nn.Module) -> tuple[float, str] | None:
    """How a frozen RMSNorm computes, as Liger has it: what is added to its weight, and what is
    computed in fp32; None: it is none, or of another form."""
    kind: Any = type(module)
    names = [name for name, _ in [*module.named_parameters(), *module.named_buffers()]]
    if names != ["weight"] or module.weight.requires_grad or "Norm" not in kind.__name__:
        return None
    form: tuple[float, str] | None = _form_of_class(kind)
    return form


def _eps_of(norm: Any) -> str:
    """What a norm calls its epsilon."""
    return "eps" if hasattr(norm, "eps") else "variance_epsilon"


@cache
def _form_of_class(kind: Any) -> tuple[float, str] | None:
    """The form of a class of norms, made with a width alone; tried on numbers in bf16, in which
    the forms differ, and with an epsilon that counts."""
    try:
        with _disable_current_modes(), torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            norm = kind(64).to("cpu", torch.bfloat16)
            norm.weight.copy_(torch.randn(64))
            setattr(norm, _eps_of(norm), 0.37)
            x = torch.randn(32, 64).to(torch.bfloat16)
            found = norm(x)
            for form in ((0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")):
                if torch.equal(found, _by_formula(x, norm.weight, 0.37, *form)):
                    return form
    except Exception:  # it is made or called in another way
        pass
    return None


def _by_formula(x: Tensor, weight: Tensor, eps: float, offset: float, casting: str) -> Tensor:
    """RMSNorm of x [T, n]; "llama": multiplied with the weight in x's dtype, "gemma": in fp32."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if casting == "llama":
        return (offset + weight) * wide.to(x.dtype)
    return (wide * (offset + weight.float())).to(x.dtype)


class _NormStandIn(torch.autograd.Function):
    """What a plan sees of the kernel: keeps its input, and a number a row in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        rstd = torch.empty(x.shape[:-1].numel(), dtype=torch.float32, device=x.device)
        ctx.save_for_backward(x, rstd)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.empty_like(grad.contiguous())


# --- rotary embedding -------------------------------------------------------------------------


@untraced
def _attention_forward(attention: Any, *args: Any, **kwargs: Any) -> Any:
    with _rotating():
        return type(attention).forward(attention, *args, **kwargs)


@contextmanager
def _rotating() -> Iterator[None]:
    """While an attention of ours computes, in this thread, its family's rotary embedding is the
    kernel's."""
    before = getattr(_LOCAL, "on", False)
    _LOCAL.on = True
    try:
        yield
    finally:
        _LOCAL.on = before


class Rotary:
    """In the place of a family's rotary embedding: that one, but for attentions of ours."""

    def __init__(self, stock: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.stock = stock

    def __call__(
        self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        plain = not args and not kwargs and q.ndim == 4 and cos.ndim == 3
        if not (getattr(_LOCAL, "on", False) and plain and launches(q)):
            return self.stock(q, k, cos, sin, *args, **kwargs)
        if cos.shape[-1] != q.shape[-1]:
            return self.stock(q, k, cos, sin)
        rotated: tuple[Tensor, Tensor]
        if isinstance(q, FakeTensor):
            rotated = _RotaryStandIn.apply(q, k, cos, sin)
        else:
            from liger_kernel.ops import LigerRopeFunction

            rotated = LigerRopeFunction.apply(q, k, cos, sin)
        return rotated


@cache
def _takes_rotary(kind: Any) -> bool:
    """Whether a class's forward rotates as the kernel does; if so, what it calls is told apart from
    now on."""
    module: Any = sys.modules.get(kind.__module__)
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    stock = getattr(module, ROTARY, None)
    if stock is None or code is None or ROTARY not in code.co_names:
        return False
    if not isinstance(stock, Rotary):
        if not _rotates_halves(stock):
            return False
        setattr(module, ROTARY, Rotary(stock))
    return True


def _rotates_halves(rotary: Callable[..., Any]) -> bool:
    """Whether it turns the two halves of each head by the angles; tried on numbers."""
    try:
        with _disable_current_modes(), torch.random.fork_rng([]), torch.no_grad():
            torch.manual_seed(0)
            q, k = torch.randn(2, 3, 5, 8), torch.randn(2, 1, 5, 8)
            angles = torch.randn(2, 5, 4)
            cos, sin = (torch.cat([each, each], -1) for each in (angles.cos(), angles.sin()))
            found = rotary(q, k, cos, sin)
            wanted = [_turned(each, cos[:, None], sin[:, None]) for each in (q, k)]
            return all(map(torch.equal, found, wanted))
    except Exception:  # it is called in another way
        return False


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos) + (torch.cat([-second, first], dim=-1) * sin)


class _RotaryStandIn(torch.autograd.Function):
    """What a plan sees of the kernel: it writes over heads that lie one after the other, as a
    product gives them, and over copies of others."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos.contiguous(), sin.contiguous())
        return _in_rows(q), _in_rows(k)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor, grad_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return _in_rows(grad_q), _in_rows(grad_k), None, None


def _in_rows(x: Tensor) -> Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2)
