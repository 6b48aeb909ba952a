"""Selection by gradient for a whole quantized model whose dense gradients fit nowhere.

The gradients of all target matrices together are as large as the unquantized model. So the
calibration set is run several times, and each time every matrix accumulates the gradient of one
row tile only; the tile's scores go into that matrix's streamed top-k and the buffer is used again.

Cost: rounds = ⌈fp32 bytes of all targets / budget⌉ forward and backward passes over the
calibration set, and budget bytes of buffers. Llama-2-7B with a budget of 1 GiB: 25 rounds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from leanlift.errors import UserError
from leanlift.layers import FrozenLinear
from leanlift.selection import StreamedTopK
from leanlift.tiles import TILE_ROW_MULTIPLE, part_shape, parts_of

DEFAULT_BUDGET = 2**30


def gradient_masks(
    model: nn.Module,
    layers: Mapping[str, FrozenLinear],
    counts: Mapping[str, int],
    batches: Iterable[Mapping[str, Tensor]],
    budget: int = DEFAULT_BUDGET,
    progress: bool = True,
) -> dict[str, Tensor]:
    """Positions of the largest |accumulated gradient| of each layer: sorted flat int64.

    Args:
        model: called as `model(**batch)`; its output has a `loss`.
        layers: the layers to score, frozen.
        counts: entries to select, by name; of a stack, in each of its matrices.
        batches: the calibration set; gone through several times, so no one-shot iterator.
        budget: bytes of gradient held at once, over all layers.
        progress: whether to show a bar over the rounds.

    Raises:
        UserError: no batches, or a loss that is not finite.
    """
    batches = list(batches)
    if not batches:
        raise UserError('selector="gradient" needs at least one calibration batch, got none.')
    total = sum(4 * layer.out_features * layer.in_features for layer in layers.values())
    rounds = max(1, -(-total // budget))
    heights = {name: _tile_height(layer.out_features, rounds) for name, layer in layers.items()}
    rounds = max(-(-layer.out_features // heights[name]) for name, layer in layers.items())
    tops = {name: _Largest(layer, counts[name], heights[name]) for name, layer in layers.items()}
    device = next(iter(layers.values())).weight.device
    for number in tqdm(range(rounds), desc="Calibrating", unit="round", disable=not progress):
        tiles = {}
        for name, layer in layers.items():
            start = number * heights[name]
            stop = min(start + heights[name], layer.out_features)
            if start < stop:
                tiles[name] = GradientTile(start, stop, layer.in_features, device)
        with _observed(layers, tiles):
            for batch in batches:
                loss = model(**{key: value.to(device) for key, value in batch.items()}).loss
                if not torch.isfinite(loss):
                    raise UserError(
                        f"the loss of a calibration batch is {loss.item()}: look for a damaged row."
                    )
                loss.backward()
        for name, tile in tiles.items():
            tops[name].push(tile.gradient.abs_(), tile.start)
    return {name: top.flat() for name, top in tops.items()}


class _Largest:
    """The largest scores of a layer's weight, of a stack those of each of its matrices.

    Args:
        layer: the layer.
        count: how many, of each matrix.
        height: rows in one push, at most.
    """

    def __init__(self, layer: FrozenLinear, count: int, height: int) -> None:
        self.rows, self.n = part_shape(layer.weight_tiles)
        numel, block = self.rows * self.n, min(height, self.rows) * self.n
        self.tops = [
            StreamedTopK(count, numel, block, layer.weight.device)
            for _ in range(parts_of(layer.weight_tiles))
        ]

    def push(self, scores: Tensor, first: int) -> None:
        """Offer the scores [r, n] of rows `first:first + r`."""
        last = first + len(scores)
        for part, top in enumerate(self.tops):
            at = part * self.rows
            start, stop = max(first, at), min(last, at + self.rows)
            if start < stop:
                own = scores[start - first : stop - first]
                top.push(own.reshape(-1), (start - at) * self.n)

    def flat(self) -> Tensor:
        """Sorted flat positions int64."""
        size = self.rows * self.n
        return torch.cat([top.flat() + part * size for part, top in enumerate(self.tops)])


class GradientTile:
    """The accumulated gradient of rows start:stop of one matrix, fp32 [stop - start, n]."""

    def __init__(self, start: int, stop: int, n: int, device: torch.device) -> None:
        self.start, self.stop = start, stop
        self.gradient = torch.zeros(stop - start, n, device=device)

    def add(self, x: Tensor, grad_y: Tensor, first: int = 0) -> None:
        """Add the share of one backward pass: x [T, n], and grad_y [T, r] of rows `first:first +
        r`."""
        start, stop = max(self.start, first), min(self.stop, first + grad_y.shape[1])
        if start < stop:
            share = grad_y[:, start - first : stop - first].T @ x
            self.gradient[start - self.start : stop - self.start] += share


@contextmanager
def _observed(layers: Mapping[str, FrozenLinear], tiles: Mapping[str, GradientTile]) -> Any:
    """Let each tile see the inputs and output gradients of its layer."""
    try:
        for name, tile in tiles.items():
            layers[name].observer = tile.add
        yield
    finally:
        for layer in layers.values():
            layer.observer = None


def _tile_height(m: int, rounds: int) -> int:
    rows = -(-m // rounds)
    return min(m, -(-rows // TILE_ROW_MULTIPLE) * TILE_ROW_MULTIPLE)
