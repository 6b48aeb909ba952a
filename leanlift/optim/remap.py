"""Moving Adam's moments along with the entries they belong to.

The values of a layer are one 1-D Parameter, so any optimizer keeps compact state by
construction. When a refresh replaces entries, the state must be re-sorted in the same way:
survivors keep their moments, and newcomers need a start.

A newcomer with zero moments under an old step count is dangerous: bias correction is long over,
so its first updates are up to (1 - β1^t) / sqrt(1 - β2^t) times the learning rate, which reaches
6.6 for β = (0.9, 0.999). Newcomers therefore start with a zero first moment and the *largest*
second moment of their matrix: for a gradient no larger than the largest that the matrix has been
seeing, the update stays at or below what an old entry would do, and the second moment then decays
to the newcomer's own. `SparseAdamW` also clamps the first update of a newcomer to the learning
rate, whatever its gradient.

fp32 moments of survivors move bit for bit. 8-bit moments cannot: a block of 256 entries shares one
scale, and entries move between blocks, so a survivor is rounded once more, in its new block. Its
error is at most half a step of the map at the scale of that block, which a newcomer may raise to
the largest second moment of the matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from leanlift.errors import UserError
from leanlift.optim.adamw import SparseAdamW
from leanlift.optim.moments import (
    TABLES_NBYTES,
    BnbMoments,
    Float32Moments,
    Moments,
    own_moments,
)
from leanlift.optim.saved import unwrap
from leanlift.weights import bnb


def check_remappable(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state a mask refresh could not move.

    Raises:
        UserError: anything but `SparseAdamW`, torch's Adam/AdamW (without amsgrad) and
            bitsandbytes' Adam/AdamW, paged or not.
    """
    _moments_of(unwrap(optimizer))


@torch.no_grad()
def remap_entries(optimizer: Optimizer, parameter: nn.Parameter, source: Tensor) -> None:
    """Re-sort the moments of `parameter` after a mask change.

    Args:
        optimizer: the optimizer, possibly wrapped by accelerate.
        parameter: the values of one layer, [k].
        source: int64 [k]; for each entry now, the place it had before, -1 for a newcomer.
    """
    optimizer = unwrap(optimizer)
    state = optimizer.state.get(parameter)
    if not state:  # no step has been taken yet
        return
    moments = _moments_of(optimizer, parameter)
    first, second = moments.read(state)
    stays = source >= 0
    place = source.clamp_min(0)
    moments.write(
        state,
        torch.where(stays, first[place], first.new_zeros(())),
        torch.where(stays, second[place], second.max()),
    )


def state_nbytes(optimizer: Optimizer | None, apart: Iterable[Tensor] = ()) -> int:
    """Bytes of all tensors in the optimizer's state, shared lookup tables counted once.

    The tables of `SparseAdamW` are no part of its state, but are counted, once per device.

    Args:
        optimizer: None: no bytes.
        apart: buffers in which some of them lie that are counted elsewhere.
    """
    if optimizer is None:
        return 0
    optimizer = unwrap(optimizer)
    tensors = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for tensor in state.values()
        if isinstance(tensor, Tensor)
    }
    for buffer in apart:
        tensors.pop(buffer.untyped_storage().data_ptr(), None)
    devices = {
        state["exp_avg_codes"].device
        for state in optimizer.state.values()
        if isinstance(optimizer, SparseAdamW) and "exp_avg_codes" in state
    }
    return sum(tensors.values()) + TABLES_NBYTES * len(devices)


def _moments_of(optimizer: Optimizer, parameter: nn.Parameter | None = None) -> Moments:
    """The layout of the optimizer's state: `parameter`'s, where groups may differ."""
    if isinstance(optimizer, SparseAdamW):
        groups = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
        return own_moments((groups or optimizer.param_groups)[0]["moments"])
    if not any(group.get("amsgrad") for group in optimizer.param_groups):
        if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)):
            return Float32Moments()
        if bnb.is_adam_8bit(optimizer):
            return BnbMoments()
    raise UserError(
        f"a mask refresh cannot move the state of {type(optimizer).__name__}: use "
        "optim=sparse_adamw, adamw_torch or adamw_8bit, or set refresh_interval=0."
    )
