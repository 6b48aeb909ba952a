"""The experts of a mixture as one layer: a stack of matrices [E, m, n], of which few are asked for.

transformers keeps the experts of a block in 3-D Parameters, and each family computes with them in
code of its own: activation, clamps, biases and the weights of the routes are its matter. So what
stands here takes the place of the Parameter, not of the family's module. Its code goes on as it
is, and where it multiplies tokens with the stack, torch asks whoever is among the factors
(`__torch_function__`): the answer is a product with the effective weights of the experts that have
tokens, one after the other, each made in the scratch that all layers share.

All experts of a stack have one index over the rows of all, [E * m, n], one Parameter `values` and
one retired store: an optimizer sees one tensor, whose gradient comes once in a backward pass.
Whether the family multiplies with an expert's matrix or with its transpose is asked at the product:
entries, tiles and index are those of the matrix as it is stored.

Refused: any other use of the stack. One sync a product tells how many tokens each expert has.

Shapes: x [S, in], sorted by expert; W_e [m, n]; y = x W_e^T (in = n) or y = x W_e (in = m).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from leanlift.layers.autograd import KeepInput, Multiply
from leanlift.layers.cpu_product import times, times_turned
from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.lift import LiftLinear
from leanlift.layers.untraced import untraced
from leanlift.layers.workspace import Workspace
from leanlift.tiles import part_shape, parts_of

PLANNED = 2
"""Experts that a plan goes over: the second has what the first leaves behind."""


class Tokens(NamedTuple):
    """Rows `start:stop` of x are for this expert."""

    expert: int
    start: int
    stop: int


class Factor:
    """What torch asks when it is among the factors of a product."""

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        return _answer(function, args, kwargs or {})


class FrozenExperts(Factor, FrozenLinear):
    """A frozen stack of experts, in the place of a family's Parameter [E, m, n].

    Args:
        base, weight, workspace: as for `FrozenLinear`; the weight is a stack (`tiles.StackedTiles`)
            whose rows are those of all experts.
    """

    @property
    def experts(self) -> int:
        """E."""
        return parts_of(self.weight_tiles)

    @property
    def shape(self) -> torch.Size:
        """[E, m, n], as the Parameter has it."""
        return torch.Size((self.experts, *self.matrix_shape))

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(m, n) of each."""
        return part_shape(self.weight_tiles)

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.weight_tiles.device

    @property
    def dtype(self) -> torch.dtype:
        """In which a family computes with them."""
        dtype: torch.dtype = getattr(self.weight_tiles, "computes_in", self.weight_tiles.dtype)
        return dtype

    def transpose(self, one: int, other: int) -> TurnedExperts:
        """Every expert's transpose [E, n, m], for a product."""
        if {one % 3, other % 3} != {1, 2}:
            raise _unknown(f"a transpose of dimensions {one} and {other}")
        return TurnedExperts(self)

    def forward(self, x: Tensor) -> Tensor:
        raise _unknown("a product with all experts at once")

    def __getitem__(self, expert: Any) -> Tensor:
        raise _unknown("experts taken out of their stack")

    def multiply(self, x: Tensor, tokens: list[Tokens], turned: bool) -> Tensor:
        """y [S, out] of x [S, in]; zero in rows that are no expert's.

        Args:
            x: sorted by expert.
            tokens: whose rows are whose.
            turned: whether y = x W_e^T, else x W_e.
        """
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product = ExpertsProduct(self, tokens, turned)
        if x.dim() != 2 or x.shape[1] != product.in_features:
            raise ValueError(f"expected [S, {product.in_features}], got {tuple(x.shape)}")
        carrier = self.keep(x, product) if torch.is_grad_enabled() else None
        return Multiply.apply(x, carrier, product)

    def keep(self, x: Tensor, product: ExpertsProduct) -> Tensor | None:
        """The thread to whoever needs x and grad_y in the backward pass; None if nobody does."""
        if self.observer is None:
            return None
        anchor = torch.zeros((), device=x.device, requires_grad=True)
        return KeepInput.apply(x, anchor, product, product.observe)

    def even_tokens(self, rows: int) -> list[Tokens]:
        """As many rows for each expert as for any other; in a plan, of the first few alone."""
        each = rows // self.experts
        wanted = self.experts if self.workspace.stands_for is None else PLANNED
        return [Tokens(e, e * each, (e + 1) * each) for e in range(min(wanted, self.experts))]

    def tokens(self, offs: Tensor, rows: int) -> list[Tokens]:
        """The experts that have rows, from where those of each end, int32 [E]. A plan, whose
        tensors have no numbers, takes them to be even."""
        if self.workspace.stands_for is not None:
            return self.even_tokens(rows)
        ends = pairwise((0, *offs.tolist()))
        return [Tokens(e, start, stop) for e, (start, stop) in enumerate(ends) if start < stop]


class LiftExperts(FrozenExperts, LiftLinear):
    """A frozen stack of experts with trainable offsets at chosen positions of each.

    Args:
        base, weight, workspace: as for `FrozenExperts`.
        index, values_dtype: as for `LiftLinear`, over the rows of all experts.
    """

    def keep(self, x: Tensor, product: ExpertsProduct) -> Tensor | None:
        if self.observer is not None or not self.trains_now:
            return super().keep(x, product)
        self.bring()
        return KeepInput.apply(x, self.values, product, self._gradient_of(product))

    def _gradient_of(self, product: ExpertsProduct) -> Callable[[Tensor, Tensor], Tensor]:
        """What forms d loss / d values [k] from x [S, in] and grad_y [S, out]."""

        def gradient_of(x: Tensor, grad_y: Tensor) -> Tensor:
            self.bring()
            gradient = torch.zeros_like(self.values)
            for left, right, first in product.factors(x, grad_y):
                self.gradient_of_rows(left, right, first, gradient)
            return gradient if self.scale == 1 else gradient.mul_(self.scale)

        return gradient_of


@dataclass(frozen=True)
class TurnedExperts(Factor):
    """The experts' transposes, as a factor of a product."""

    layer: FrozenExperts

    @property
    def device(self) -> torch.device:
        """Where the experts are."""
        return self.layer.device

    @property
    def dtype(self) -> torch.dtype:
        """In which a family computes with them."""
        return self.layer.dtype


@dataclass(frozen=True)
class ExpertsProduct:
    """One product of tokens with the experts of a layer; what `autograd.Layer` asks for."""

    layer: FrozenExperts
    tokens: list[Tokens]
    turned: bool

    @property
    def in_features(self) -> int:
        """Of x."""
        return self.layer.matrix_shape[self.turned]

    @property
    def out_features(self) -> int:
        """Of y."""
        return self.layer.matrix_shape[not self.turned]

    @property
    def workspace(self) -> Workspace:
        """What the layers of the model share."""
        return self.layer.workspace

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weights do."""
        return self.layer.version

    def lasting_weight(self, dtype: torch.dtype) -> None:
        """None: experts are made one after the other."""

    def product(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """y [S, out]."""
        return self._products(x, self.out_features, self.turned)

    def product_back(self, grad_y: Tensor, weight: Tensor | None = None) -> Tensor:
        """The gradient of x [S, in]."""
        return self._products(grad_y, self.in_features, not self.turned)

    def _products(self, x: Tensor, width: int, turned: bool) -> Tensor:
        y = x.new_zeros(x.shape[0], width)
        m, by_tiles = self.layer.matrix_shape[0], self.layer.multiplies_by_tiles
        for expert, start, stop in self.tokens:
            own, rows = slice(start, stop), partial(self._rows_of, expert * m, x.dtype)
            if by_tiles:
                (times_turned if turned else times)(x[own], rows, y[own])
            else:
                weight = rows(0, m)
                torch.mm(x[own], weight.T if turned else weight, out=y[own])
        return y

    def _rows_of(self, first: int, dtype: torch.dtype, start: int, stop: int) -> Tensor:
        """Rows of an expert, whose first one in the stack is `first`."""
        return self.layer.effective_rows(first + start, first + stop, dtype)

    def factors(self, x: Tensor, grad_y: Tensor) -> list[tuple[Tensor, Tensor, int]]:
        """For each expert that has tokens: factors left [T, m] and right [T, n] of the gradient of
        its matrix, left^T @ right, and the first of its rows in the stack."""
        left, right = (grad_y, x) if self.turned else (x, grad_y)
        m = self.layer.matrix_shape[0]
        return [(left[a:b], right[a:b], expert * m) for expert, a, b in self.tokens]

    def observe(self, x: Tensor, grad_y: Tensor) -> None:
        """Show the layer's observer what the dense gradient is formed from."""
        if self.layer.observer is not None:
            for left, right, first in self.factors(x, grad_y):
                self.layer.observer(right, left, first)


@untraced
def _answer(function: Callable[..., Any], args: tuple[Any, ...], more: Mapping[str, Any]) -> Tensor:
    """What torch gets that was asked for a product with experts: grouped, or all with as many."""
    name = getattr(function, "__name__", str(function))
    x, stack = args if len(args) == 2 else (None, None)
    turned = isinstance(stack, TurnedExperts)
    layer = stack.layer if isinstance(stack, TurnedExperts) else stack
    if not isinstance(x, Tensor) or not isinstance(layer, FrozenExperts):
        raise _unknown(name)
    if name in ("_grouped_mm", "grouped_mm", "grouped_mm_fallback"):
        return layer.multiply(x, layer.tokens(more["offs"], x.shape[0]), turned)
    if name == "bmm":
        y = layer.multiply(x.flatten(0, 1), layer.even_tokens(x.shape[0] * x.shape[1]), turned)
        return y.unflatten(0, x.shape[:2])
    raise _unknown(name)


def _unknown(what: str) -> RuntimeError:
    return RuntimeError(
        f"leanlift multiplies trained experts in groups, and was asked for {what}: let the model "
        'compute with experts_implementation="grouped_mm".'
    )
