"""What several processes that train one model agree on: `accelerate launch`, `torchrun`.

Every process has the whole model and trains it on rows of its own. The gradients are added up
(torch's DistributedDataParallel, or the hooks of an update in the backward pass); all else that is
decided must be decided alike: whether a step is applied, which positions a mask has. In one process
nothing here does anything.
"""

from __future__ import annotations

import gc
import hashlib
import os
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from leanlift.errors import UserError


def processes() -> int:
    """How many train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; before they can talk, as its launcher says."""
    return dist.get_rank() if processes() > 1 else _of_the_launcher("RANK")


def local_rank() -> int:
    """Which of those on this machine this is, and so which GPU it computes on."""
    return _of_the_launcher("LOCAL_RANK")


def launched() -> int:
    """How many a launcher says that there are."""
    return max(1, _number("WORLD_SIZE"))


def _of_the_launcher(name: str) -> int:
    """A number of one of several; one alone is the first, whatever is left in its environment."""
    return _number(name) if launched() > 1 else 0


def _number(name: str) -> int:
    given = os.environ.get(name, "")
    return int(given) if given.isdecimal() else 0


def is_first() -> bool:
    """Whether this is the one that writes."""
    return rank() == 0


def wait_for_all() -> None:
    """Go on when all of them have come here."""
    if processes() > 1:
        dist.barrier()


def part() -> None:
    """Leave the others when all of them are done. Who leaves while another still talks, or with
    something that talks still alive, may end both with an abort of the system's."""
    if processes() > 1:
        gc.collect()
        dist.barrier()
        dist.destroy_process_group()


def of_all(thing: Any) -> list[Any]:
    """What each of them has, in their order; for few plain things."""
    if processes() == 1:
        return [thing]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, thing)
    return found


def fine_everywhere(fine: Tensor) -> Tensor:
    """Whether a bool scalar is true in all of them."""
    if processes() == 1:
        return fine
    flag = fine.to(torch.int32)
    dist.all_reduce(flag, dist.ReduceOp.MIN)
    return flag.bool()


def mean_(tensor: Tensor) -> Tensor:
    """The mean of a tensor over all of them, in place."""
    if processes() > 1:
        dist.all_reduce(tensor)
        tensor.div_(processes())
    return tensor


def of_the_first(tensor: Tensor) -> Tensor:
    """What the first one has in the place of a tensor, which all have in one shape."""
    if processes() == 1:
        return tensor
    tensor = tensor.clone()
    dist.broadcast(tensor, 0)
    return tensor


def check_same(tensors: Iterable[Tensor], what: str, device: torch.device) -> None:
    """Refuse to go on where the processes have other numbers.

    Args:
        tensors: the numbers.
        what: they are, in words; the sentence begins with it.
        device: that the processes talk over.

    Raises:
        UserError: one has others than the first.
    """
    if processes() == 1:
        return
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    own = torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8).to(device)
    all_ = [torch.empty_like(own) for _ in range(processes())]
    dist.all_gather(all_, own)
    other = [rank for rank, one in enumerate(all_) if not torch.equal(one, all_[0])]
    if other:
        raise UserError(
            f"{what} are others in process {other[0]} than in the first: give all processes the "
            "same base, config and seed, and load the same adapter in each."
        )
