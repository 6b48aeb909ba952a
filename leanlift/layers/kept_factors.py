"""The last Linear of a gated MLP, for whose sake its input is not kept.

h = act(gate) * up is what that Linear multiplies. The gradient of its values needs h, that of the
product gate and up: three tensors of the widest size, one of which is made of the others. So gate
and up are kept, once for both, and h is made again, as `made_again` has it: in a block that is not
recomputed a seventh of what is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from leanlift.layers.again import Autocast
from leanlift.layers.lift import LiftLinear
from leanlift.layers.made_again import made_of

Act = Callable[[Tensor], Tensor]
Glu = Callable[[Tensor, Tensor, Act], Tensor]


def last_input(last: nn.Module, gate: Tensor, up: Tensor, act: Act, glu: Glu) -> Tensor:
    """h, `glu(gate, up, act)`, for the last Linear of a gated MLP and nobody else.

    The factors are to be held by nobody when it is multiplied.
    """
    if isinstance(last, LiftLinear) and _is_kept_for(last, gate, up):
        last.bring()
        return made_of(partial(_product, glu, act), (gate, up), last.workspace.products, id(last))
    return glu(gate, up, act)


def _product(glu: Glu, act: Act, gate: Tensor, up: Tensor) -> Tensor:
    return glu(gate, up, act)


def _is_kept_for(last: LiftLinear, gate: Tensor, up: Tensor) -> bool:
    """Whether h would be kept, as it is, for the values' gradient, and gate and up for theirs."""
    trains = torch.is_grad_enabled() and last.observer is None and last.trains_now
    dtype = Autocast.of(gate).computed(gate.dtype)
    return trains and gate.requires_grad and up.requires_grad and gate.dtype == up.dtype == dtype
