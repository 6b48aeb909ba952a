"""What has been made once, remembered by the bytes that it took.

Four blocks make some hundred weights and gradients in a step, of seven kinds. Made under fake
tensors, each costs the host a few dozen operations, and that is most of a plan's time. So one of
each kind is made, and the next ones of that kind only take as many bytes for a moment, and leave
what they leave; so do those of a later plan. Nothing is estimated: whatever decides those bytes is
part of a kind, and what left anything else behind, such as a scratch that had to grow, is not
remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.layers import FrozenLinear, LiftLinear
from leanlift.measure.live import LiveBytes

Kind = tuple[Any, ...]
Most = dict[Kind, int]


class Remembered:
    """Stands in for the layers of a fake model while `live` follows a step of it.

    Args:
        live: what counts the bytes.
        most: what has been made, by its kind, and the most bytes that it took at once; added to.
    """

    def __init__(self, live: LiveBytes, most: Most) -> None:
        self.live, self._most = live, most

    def rows(
        self, layer: FrozenLinear, first: int, last: int, dtype: torch.dtype, lasting: bool
    ) -> Tensor:
        """The effective weight's rows: the scratch's own, or a new tensor."""
        kind = ("rows", first, last, dtype, lasting, *_looks(layer))
        most = self._most.get(kind)
        if most is None:
            make = partial(layer.made_rows, first, last, dtype, lasting)
            return self._made(kind, make, layer, lasting)
        self.live.allow(most)
        n = layer.weight_tiles.shape[1]
        if layer.needs_scratch(dtype) and not lasting:
            return layer.scratch.take(last - first, n, dtype, layer.weight_tiles.device)
        return torch.empty(last - first, n, dtype=dtype, device=layer.weight_tiles.device)

    def gradient(
        self, layer: LiftLinear, left: Tensor, right: Tensor, first: int, out: Tensor
    ) -> None:
        """Nothing is written, which nobody could read."""
        inputs = (left.shape, left.stride(), left.dtype, right.shape, right.stride(), right.dtype)
        kind = ("gradient", first, *inputs, out.dtype, *_looks(layer))
        most = self._most.get(kind)
        if most is None:
            self._made(kind, lambda: layer.formed_gradient(left, right, first, out), layer)
        else:
            self.live.allow(most)

    def look(self, gradient: Tensor) -> None:
        """What training does with every gradient."""
        kind = ("look", gradient.shape, gradient.dtype)
        most = self._most.get(kind)
        if most is None:
            _, self._most[kind] = self._measured(lambda: torch.isfinite(gradient).all())
        else:
            self.live.allow(most)

    def _measured(self, make: Callable[[], Any]) -> tuple[Any, int]:
        """What is made, and the most bytes that it took at once."""
        live = self.live
        before, peak = live.current, live.peak
        live.peak = before
        made = make()
        most, live.peak = live.peak - before, max(peak, live.peak)
        return made, most

    def _made(
        self, kind: Kind, make: Callable[[], Any], layer: FrozenLinear, lasting: bool = False
    ) -> Any:
        """Make it, and remember the most bytes that it took at once."""
        before, scratch = self.live.current, layer.scratch.nbytes
        made, most = self._measured(make)
        new = isinstance(made, Tensor) and (lasting or not layer.needs_scratch(made.dtype))
        left = made.nbytes if new else 0
        if self.live.current - before == left and layer.scratch.nbytes == scratch:
            self._most[kind] = most
        return made


def _looks(layer: FrozenLinear) -> Kind:
    """Whatever decides the bytes of a weight and of its gradient."""
    weight, on = layer.weight_tiles, layer.workspace.stands_for
    held = type(weight), weight.shape, weight.dtype, getattr(weight, "format", None)
    stores = layer.offsets(0, layer.out_features)
    return type(layer), on, *held, *((store.index.count, store.values.dtype) for store in stores)


@contextmanager
def remembering(model: nn.Module, live: LiveBytes, most: Most) -> Iterator[Remembered]:
    """What the layers of a fake model make is remembered in `most` while `live` follows it."""
    spaces = {id(m.workspace): m.workspace for m in model.modules() if isinstance(m, FrozenLinear)}
    stand_in = Remembered(live, most)
    try:
        for space in spaces.values():
            space.stand_in = stand_in
        yield stand_in
    finally:
        for space in spaces.values():
            space.stand_in = None
