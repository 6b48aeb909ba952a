"""What happens to offsets when the mask changes: survivors stay, leavers retire, newcomers start.

Nothing is dropped: an entry that leaves keeps the offset it reached in the retired store and gets
it back when it returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.sparse.index import SegmentedIndex
from leanlift.sparse.offsets import LayerOffsets, Offsets, find_positions


@dataclass(frozen=True)
class MaskChange:
    """The result of replacing one mask by another of the same count.

    Attributes:
        learned: the new active entries [k], and those that are no longer active but hold an offset.
        source: for each new entry the place it had in the old order, -1 for a newcomer: int64 [k].
    """

    learned: LayerOffsets
    source: Tensor

    @property
    def churn(self) -> float:
        """Share of the entries that were replaced."""
        return float((self.source < 0).float().mean()) if self.source.numel() else 0.0

    @property
    def retired_count(self) -> int:
        """Entries that are retired after the change."""
        return 0 if self.learned.retired is None else self.learned.retired.count


def change_mask(learned: LayerOffsets, flat: Tensor) -> MaskChange:
    """Move offsets to the mask `flat`: sorted, distinct int64 [k].

    Survivors keep their offset bit for bit. Newcomers start from their retired offset, or zero.
    Leavers join the retired store, unless their offset is exactly zero: then there is nothing
    to keep. Scales stay what they are.
    """
    active, shape, scale = learned.active, learned.active.index.shape, learned.active.scale
    old_flat, old_values = active.index.to_flat(), active.values
    source = find_positions(old_flat, flat)
    values = torch.zeros(flat.numel(), dtype=old_values.dtype, device=old_values.device)
    stay = source >= 0
    values[stay] = old_values[source[stay]]
    left = (find_positions(flat, old_flat) < 0) & (old_values != 0)
    retired_flat, retired_values = old_flat[left], old_values[left]
    if learned.retired is not None:
        slept, offsets = learned.retired.index.to_flat(), learned.retired.values
        returning = find_positions(slept, flat)
        back = (returning >= 0) & ~stay
        values[back] = offsets[returning[back]]
        remain = find_positions(flat, slept) < 0
        retired_flat, order = torch.cat([retired_flat, slept[remain]]).sort()
        retired_values = torch.cat([retired_values, offsets[remain]])[order]
    retired = None
    if retired_flat.numel():
        retired = Offsets(SegmentedIndex.from_flat(retired_flat, shape), retired_values, scale)
    index = SegmentedIndex.from_flat(flat, shape)
    return MaskChange(LayerOffsets(Offsets(index, values, scale), retired), source)
