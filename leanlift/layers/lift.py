"""A frozen Linear with trainable offsets at chosen positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.layers.autograd import KeepInput, carrier_of
from leanlift.layers.effective import EffectiveTiles, HeadWeight
from leanlift.layers.frozen import FrozenLinear
from leanlift.layers.gradient_rows import gradient_rows
from leanlift.layers.slot import Slot, is_state_key, keep_dtype, learned_of, state_of
from leanlift.layers.workspace import Workspace
from leanlift.sparse import (
    LayerOffsets,
    MaskChange,
    Offsets,
    SegmentedIndex,
    change_mask,
    common,
)
from leanlift.streaming import StatePool
from leanlift.tiles import RowTiles, row_ranges


class LiftLinear(FrozenLinear):
    """A frozen Linear with trainable offsets at chosen positions.

    Args:
        base, weight, workspace: as for `FrozenLinear`.
        index: the active positions.
        values_dtype: fp32, or bf16 for an optimizer that rounds stochastically.

    Attributes:
        values: Parameter [k], the active offsets in the order of `index`; zero at first. Its
            gradient has its dtype.
        retired_index, retired_values: offsets that a mask change took out of training; they stay
            part of the effective weight. None while there are none.
        scale: what all offsets are multiplied by: 1.0 unless someone turns an adapter up or down.
        shelf: what other adapters have learned here, by their names; it moves with the layer.
        is_new: whether the base has nothing here, so that there is nothing to compute as without
            an adapter.
        brought_by: what brings all that is learned here to the device, and as which block; None: it
            is there.
        gradient_sum: of the micro-batches of a step so far, where that is brought too.
    """

    index: SegmentedIndex
    values: nn.Parameter
    retired_index: SegmentedIndex | None
    retired_values: Tensor | None
    scale: float

    def __init__(
        self,
        base: nn.Module,
        weight: RowTiles,
        index: SegmentedIndex,
        workspace: Workspace,
        values_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, weight, workspace)
        if index.shape != weight.shape:
            raise ValueError(f"expected an index of shape {weight.shape}, got {index.shape}")
        self.brought_by: tuple[StatePool, int] | None = None
        self.gradient_sum: Tensor | None = None
        self.put_on(Slot.zero(index, values_dtype))
        self.shelf: dict[str, Slot] = {}
        self._merged: tuple[tuple[float, ...], Tensor] | None = None
        self.is_new = False

    @property
    def effective(self) -> EffectiveTiles:
        """W_eff = D(Q) + retired + active offsets, as RowTiles in fp32."""
        return EffectiveTiles(self)

    def _carrier(self, x: Tensor) -> Tensor | None:
        if self.observer is not None or not self.trains_now:
            return super()._carrier(x)
        self.bring()
        if (made := carrier_of(x, self)) is None:
            made = KeepInput.apply(x, self.values, self, self.values_gradient)
        return made

    def bring(self) -> None:
        """Let what is learned here be where it is computed with, until another block is brought."""
        if self.brought_by is not None:
            pool, block = self.brought_by
            pool.need(block)

    def wrote(self, updated: bool = True) -> None:
        """What is learned here has been changed in place, where `bring` has let it be; or its
        gradients' sum alone."""
        if self.brought_by is not None:
            pool, block = self.brought_by
            pool.wrote(block, updated)

    @property
    def weight(self) -> Tensor:
        """As of `FrozenLinear`; of a head the effective one, with a gradient to its values."""
        if self.is_off or not self.is_head:
            return super().weight
        weight: Tensor = HeadWeight.apply(self.values, self)
        return weight

    @property
    def merged(self) -> Tensor | None:
        """The effective weight [m, n], where it is kept for a while instead of being made for each
        use, and nothing trains. It goes as soon as the offsets are others than it was made of."""
        if self._merged is not None and self._merged[0] != self._of_offsets:
            self._merged = None
        return None if self._merged is None else self._merged[1]

    @merged.setter
    def merged(self, weight: Tensor | None) -> None:
        """Of the offsets as they are now."""
        self._merged = None if weight is None else (self._of_offsets, weight)

    @property
    def is_off(self) -> bool:
        """Whether this thread computes as without an adapter; see `Workspace.without_offsets`."""
        return self.workspace.is_off and not self.is_new

    @property
    def trains_now(self) -> bool:
        """Whether a forward pass of now has a gradient of the values."""
        merged = self._merged is not None and self.merged is not None
        return self.values.requires_grad and not self.is_off and not merged

    @property
    def is_fixed(self) -> bool:
        """Whether there is nothing to choose: every entry is trained."""
        return self.index.is_full

    @property
    def learned(self) -> LayerOffsets:
        """The active and the retired offsets, scaled."""
        return self.worn.learned

    def effective_rows(
        self, first: int, last: int, dtype: torch.dtype, lasting: bool = False
    ) -> Tensor:
        merged = None if self._merged is None or self.is_off else self.merged
        if merged is None:
            return super().effective_rows(first, last, dtype, lasting)
        return merged[first:last].to(dtype)

    def offsets(self, start: int, stop: int) -> Sequence[Offsets]:
        """The active and the retired offsets of rows `start:stop` that are computed with."""
        if self.is_off:
            return ()
        self.bring()
        stores = self.learned.stores
        if stop - start == self.out_features:
            return stores
        return [store.rows(start, stop) for store in stores]

    def add_offsets_(self, rows: Tensor, start: int, stop: int) -> None:
        """Add all offsets of rows `start:stop`, scaled, to `rows` [stop - start, n], in place."""
        self.bring()
        self.learned.add_to_(rows, start, stop)

    @property
    def version(self) -> tuple[float, ...]:
        """Changes whenever the effective weight does."""
        return () if self.is_off else self._of_offsets

    @property
    def _of_offsets(self) -> tuple[float, ...]:
        """Another one for other offsets."""
        of_values = id(self.values), self.values._version
        return *of_values, id(self.index), id(self.retired_values), self.scale

    def values_gradient(self, x: Tensor, grad_y: Tensor) -> Tensor:
        """d loss / d values [k] in their dtype, by row tiles, from x [T, n] and grad_y [T, m]."""
        self.bring()
        gradient = torch.empty_like(self.values)
        self.gradient_of_rows(grad_y, x, 0, gradient)
        return gradient if self.scale == 1 else gradient.mul_(self.scale)

    def gradient_of_rows(self, left: Tensor, right: Tensor, first: int, out: Tensor) -> None:
        """Write the entries of left^T [r, T] @ right [T, n] that are trained in rows `first:first +
        r` of the weight to their places in `out` [k], by row tiles."""
        stand_in = self.workspace.stand_in
        form = self.formed_gradient if stand_in is None else partial(stand_in.gradient, self)
        form(left, right, first, out)

    def formed_gradient(self, left: Tensor, right: Tensor, first: int, out: Tensor) -> None:
        """The same, formed by the layer itself."""
        (_, r), n = left.shape, right.shape[1]
        ops = self.workspace.ops or self.workspace.choose(right.device)
        at_once = r if ops.lists_rows else gradient_rows(r, n, right)
        for start, stop in row_ranges(r, at_once):
            index, place = self.index.part(first + start, first + stop), out
            if index.count < out.numel():
                place = out[slice(*self.index.span(first + start, first + stop))]
            rows = left if stop - start == r else left[:, start:stop]
            ops.sampled_product(rows, right, index, place, self.workspace.scratch.take)

    @torch.no_grad()
    def change_mask(self, flat: Tensor) -> MaskChange:
        """Make `flat` (sorted, distinct, as many as before) the active positions.

        The Parameter object stays the same; whoever holds state about its entries follows
        `MaskChange.source`.
        """
        if flat.numel() != self.index.count:
            raise ValueError(f"expected {self.index.count} positions, got {flat.numel()}")
        change = change_mask(self.learned, flat)
        self._put(change.learned)
        return change

    @torch.no_grad()
    def put(self, learned: LayerOffsets) -> None:
        """Take over offsets, as many active ones as before, in the place of the present ones.

        The Parameter object stays the same. Where they come from another device they are moved.

        Raises:
            ValueError: another count, or a retired position that is trained: an entry has one
                offset.
        """
        if learned.active.count != self.index.count:
            raise ValueError(f"expected {self.index.count} entries, got {learned.active.count}")
        device = self.values.device
        retired = None if learned.retired is None else learned.retired.to(device)
        moved = LayerOffsets(learned.active.to(device), retired)
        if moved.retired is not None and common(moved.active.index, moved.retired.index):
            raise ValueError("expected retired positions outside the mask, got one that is trained")
        self._put(moved)

    def _put(self, learned: LayerOffsets) -> None:
        """Take over disjoint offsets that are on the layer's device."""
        self.index, self.scale = learned.active.index, learned.active.scale
        self.values.copy_(learned.active.values)
        if (retired := learned.retired) is None or not retired.count:
            self.retired_index = self.retired_values = None
        else:
            self.retired_index = retired.index
            self.retired_values = retired.values.to(self.values.dtype)

    @property
    def retired_nbytes(self) -> int:
        """Bytes of the retired store: its index and offsets."""
        if self.retired_index is None or self.retired_values is None:
            return 0
        return self.retired_index.nbytes + self.retired_values.nbytes

    @property
    def worn(self) -> Slot:
        """What the adapter that computes has learned here."""
        return Slot(self.index, self.values, self.retired_index, self.retired_values, self.scale)

    @property
    def settled(self) -> Offsets | None:
        """The retired offsets, by the name that they have in a state dict."""
        return self.learned.retired

    @property
    def settled_count(self) -> int:
        """How many there are."""
        return 0 if (settled := self.settled) is None else settled.count

    def take_off(self) -> Slot:
        """What the adapter has learned here; an empty mask takes its place."""
        taken = self.worn
        self.put_on(Slot.empty(self.index.shape, self.values.dtype, self.values.device))
        return taken

    def put_on(self, slot: Slot) -> None:
        """Compute and train with what an adapter has learned here, whatever was here before.

        Raises:
            UserError: what is learned here comes with its block, which knows one adapter.
        """
        if self.brought_by is not None:
            raise UserError(
                "streamed state is that of one adapter: load the base anew for another one, "
                "without stream_state."
            )
        self.index, self.values, self.scale = slot.index, slot.values, slot.scale
        self.retired_index, self.retired_values = slot.retired_index, slot.retired_values

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Beside the values, the positions that they belong to, and what is retired: the tensors
        of an adapter on disk."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update(state_of(self.learned, prefix))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take over values with their positions."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        own = [key for key in state_dict if key.startswith(prefix) and is_state_key(key, prefix)]
        given = {key[len(prefix) :]: state_dict.pop(key) for key in own}
        if not given:
            missing_keys.append(f"{prefix}values")
            return
        try:
            self.put(learned_of(given, self.index.shape))
        except ValueError as error:
            error_msgs.append(f"{prefix}values: {error}")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, entries={self.index.count}"

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> LiftLinear:
        """Moves what is learned, and never changes its dtype: `half` is meant for a base."""
        moves, merged = keep_dtype(fn), self.merged
        with self._without_brought():
            super()._apply(moves, recurse=False)
        with self.without_streamed():
            for child in self.children() if recurse else ():
                child._apply(fn)
        self.merged = None if merged is None else moves(merged)
        if self.brought_by is not None:
            return self
        self.index = self.index.map(moves)
        if self.retired_index is not None and self.retired_values is not None:
            self.retired_index = self.retired_index.map(moves)
            self.retired_values = moves(self.retired_values)
        self.shelf = {name: slot.map(moves) for name, slot in self.shelf.items()}
        return self

    @contextmanager
    def _without_brought(self) -> Iterator[None]:
        """The layer without values that a pool brings: they stay where they are."""
        values = self.values
        try:
            if self.brought_by is not None:
                self._parameters["values"] = None
            yield
        finally:
            self._parameters["values"] = values
