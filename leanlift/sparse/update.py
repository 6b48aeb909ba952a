"""What happens to offsets when the mask changes: survivors stay, leavers retire, newcomers start.

All position arrays here are flat, sorted, distinct int64. Nothing is dropped: an entry that
leaves keeps the offset it reached in the retired store and gets it back when it returns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MaskChange:
    """The result of replacing one mask by another of the same count.

    flat: the new positions [k]. values: their offsets [k]. source: for each new entry the place
    it had in the old order, -1 for a newcomer [k]. retired_flat, retired_values: the entries
    that are no longer active but hold an offset.
    """

    flat: Tensor
    values: Tensor
    source: Tensor
    retired_flat: Tensor
    retired_values: Tensor

    @property
    def churn(self) -> float:
        """Share of the entries that were replaced."""
        return float((self.source < 0).float().mean()) if self.source.numel() else 0.0


def change_mask(
    old_flat: Tensor,
    old_values: Tensor,
    new_flat: Tensor,
    retired_flat: Tensor,
    retired_values: Tensor,
) -> MaskChange:
    """Move offsets from the old mask to the new one.

    Survivors keep their offset bit for bit. Newcomers start from their retired offset, or zero.
    Leavers join the retired store, unless their offset is exactly zero: then there is nothing
    to keep.
    """
    source = find_positions(old_flat, new_flat)
    returning = find_positions(retired_flat, new_flat)
    values = torch.zeros(new_flat.numel(), dtype=old_values.dtype, device=old_values.device)
    stay = source >= 0
    values[stay] = old_values[source[stay]]
    back = (returning >= 0) & ~stay
    values[back] = retired_values[returning[back]]

    left = (find_positions(new_flat, old_flat) < 0) & (old_values != 0)
    remain = find_positions(new_flat, retired_flat) < 0
    flat = torch.cat([old_flat[left], retired_flat[remain]])
    order = torch.argsort(flat)
    return MaskChange(
        flat=new_flat,
        values=values,
        source=source,
        retired_flat=flat[order],
        retired_values=torch.cat([old_values[left], retired_values[remain]])[order],
    )


def find_positions(haystack: Tensor, needles: Tensor) -> Tensor:
    """Place of each needle in the sorted haystack, -1 where it is absent."""
    if not haystack.numel():
        return torch.full_like(needles, -1)
    place = torch.searchsorted(haystack, needles).clamp_(max=haystack.numel() - 1)
    return torch.where(haystack[place] == needles, place, -1)
