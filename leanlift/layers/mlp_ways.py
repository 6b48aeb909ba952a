"""In which of the well-known ways an MLP is written: how it computes up to its last Linear.

Told from the source of its forward: gated, gated with both factors from one Linear, and a chain of
Linears and activations.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import Tensor, nn

from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.fused_glu import fused_glu, is_stock_glu
from leanlift.layers.kept_factors import Act, Glu, last_input

FUSED = re.compile(
    r"(\w+)=self\.(?P<first>\w+)\(\w+\)gate,\1=\1\.chunk\(2,dim=-1\)"
    r"\1=\1\*self\.(?P<act>\w+)\(gate\)returnself\.(?P<last>\w+)\(\1\)"
)
LINK = re.compile(r"hidden_states=self\.(\w+)\(hidden_states\)")
DROPOUT = re.compile(
    r"hidden_states=nn\.functional\.dropout\(hidden_states,p=self\.(\w+),training=self\.training\)"
)
"""Of the sources of forwards, without spaces."""


@dataclass(frozen=True)
class Way:
    """How an MLP computes: all up to its last Linear, that, and dropouts behind it.

    Attributes:
        last: the name of the last Linear.
        chain: names of what comes before it, one after the other.
        factors: of a gated one: its input [T, n] -> gate, up and the activation of gate.
        glu: what multiplies these: (gate, up, act) -> act(gate) * up.
        dropouts: names of modules, or of probabilities.
        tokens: of a piece of a long row, at most; None: as `tiled_mlp.pieces` has it.
    """

    last: str
    chain: tuple[str, ...] = ()
    factors: Callable[[Any, Tensor], tuple[Tensor, Tensor, Act]] | None = None
    glu: Glu = fused_glu
    dropouts: tuple[str, ...] = ()
    tokens: int | None = None

    @property
    def gated(self) -> bool:
        """Whether one factor is an activation of the other."""
        return self.factors is not None

    def inner(self, mlp: Any, x: Tensor) -> Tensor:
        """The input of the last Linear."""
        if self.factors is not None:
            return self.glu(*self.factors(mlp, x))
        for name in self.chain:
            x = getattr(mlp, name)(x)
        return x

    def __call__(self, mlp: Any, x: Tensor) -> Tensor:
        """The output of an MLP, but for dropouts."""
        last = getattr(mlp, self.last)
        if self.factors is None:
            h = self.inner(mlp, x)
        else:
            h = last_input(last, *self.factors(mlp, x), self.glu)
        y: Tensor = last(h)
        return y

    def is_exact(self, mlp: Any) -> bool:
        """Whether no dropout is active now."""
        found = (getattr(mlp, name) for name in self.dropouts)
        return not mlp.training or not any(each.p if hasattr(each, "p") else each for each in found)


def way_of(module: nn.Module, glu: Glu = fused_glu) -> Way | None:
    """How a module computes, where it is an MLP of a known form.

    Args:
        module: any.
        glu: what multiplies the factors of a gated one: (gate, up, act) -> act(gate) * up.
    """
    forward = type(module).forward
    if is_stock_glu(forward):
        return Way("down_proj", factors=_gated, glu=glu)
    body = _source(forward)
    fused = FUSED.fullmatch(body)
    if fused is not None:
        return Way(fused["last"], factors=partial(_both, fused["first"], fused["act"]), glu=glu)
    return _chain(module, body)


def _gated(mlp: Any, x: Tensor) -> tuple[Tensor, Tensor, Act]:
    return mlp.gate_proj(x), mlp.up_proj(x), mlp.act_fn


def _both(first: str, act: str, mlp: Any, x: Tensor) -> tuple[Tensor, Tensor, Act]:
    gate, up = getattr(mlp, first)(x).chunk(2, dim=-1)
    return gate, up, getattr(mlp, act)


def _chain(module: nn.Module, body: str) -> Way | None:
    """Linears and activations, one after the other, and dropouts."""
    if not body.endswith("returnhidden_states"):
        return None
    body = body.removesuffix("returnhidden_states")
    dropouts = tuple(DROPOUT.findall(body))
    body = DROPOUT.sub("", body)
    names = tuple(LINK.findall(body))
    parts = [getattr(module, name, None) for name in names]
    linears = [name for name, part in zip(names, parts, strict=True) if _is_linear(part)]
    if LINK.sub("", body) or len(linears) < 2 or names[0] != linears[0]:
        return None
    inner = names[: names.index(linears[-1])]
    for name, part in zip(names, parts, strict=True):
        if isinstance(part, nn.Dropout):
            dropouts += (name,)
        elif not _is_linear(part) and not (name in inner and _is_activation(part)):
            return None
    inner = tuple(name for name in inner if name not in dropouts)
    return Way(linears[-1], chain=inner, dropouts=dropouts)


def _is_linear(part: Any) -> bool:
    turned = hasattr(part, "nf") and getattr(getattr(part, "weight", None), "ndim", 0) == 2
    return isinstance(part, (FrozenLinear, nn.Linear)) or turned


def _is_activation(part: Any) -> bool:
    """Whether a module works number by number, as far as its place and its state tell."""
    known = ("torch.nn.modules.activation", "transformers.activations")
    plain = isinstance(part, nn.Module) and not [*part.parameters(), *part.buffers()]
    return plain and type(part).__module__ in known


@cache
def _source(forward: Callable[..., Any]) -> str:
    """What a forward consists of, without its first line and without spaces."""
    try:
        lines = inspect.getsource(forward).splitlines()
    except (OSError, TypeError):
        return ""
    return "".join("".join(lines[1:]).split())
