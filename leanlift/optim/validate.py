"""Whether what a checkpoint says about an optimizer can be true.

A checkpoint's files may be cut off, swapped or written by anyone, and an optimizer takes nearly
everything: a moment of the wrong length fails deep inside a kernel, one with an infinity puts NaN
into the weights a step later, and one that is missing starts afresh without a word. Here every
tensor is held against the parameter that it belongs to: keys, shape, dtype, finite numbers, second
moments that are not negative, and no more steps than were taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.optim.moments import BLOCK, OWN_MOMENTS

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ENTRIES = {
    "exp_avg": FLOATS,
    "exp_avg_sq": FLOATS,
    "momentum_buffer": FLOATS,
    "exp_avg_codes": (torch.uint8,),
    "exp_avg_sq_codes": (torch.uint8,),
    "state1": (torch.uint8, torch.float32),
    "state2": (torch.uint8, torch.float32),
}
"""Keys with one number per entry, and their dtypes."""
BLOCKS = ("exp_avg_absmax", "exp_avg_sq_absmax", "absmax1", "absmax2")
"""Keys with one fp32 scale per 256 entries."""
TABLES = ("qmap1", "qmap2")
"""Keys with a table of 256 numbers."""
NOT_NEGATIVE = ("exp_avg_sq", *BLOCKS)
LARGEST_GRADIENT = 1e19
"""The largest entry of a gradient that training applies: its square leaves room for Adam's sum."""
FIRST, SECOND = (
    ("exp_avg", "exp_avg_absmax", "absmax1"),
    ("exp_avg_sq", "exp_avg_sq_absmax", "absmax2"),
)
"""Means of gradients, and of their squares: no larger than the largest of them."""


def check_facts(facts: Any) -> None:
    """Refuse facts that `saved_state` does not write.

    Raises:
        UserError: another structure.
    """
    numbers = facts.get("numbers") if isinstance(facts, dict) else None
    groups = facts.get("groups") if isinstance(facts, dict) else None
    if not isinstance(numbers, dict) or not isinstance(groups, list):
        raise _damaged("it lacks groups or numbers")
    if not isinstance(facts.get("optimizer"), str):
        raise _damaged("it does not say which optimizer it is of")
    named: list[Any] = []
    for group in groups:
        if not isinstance(group, dict) or not isinstance(group.get("options"), dict):
            raise _damaged("a group has no options")
        if not isinstance(group.get("params"), list):
            raise _damaged("a group has no parameters")
        named += group["params"]
    if not all(isinstance(name, str) for name in named) or len(set(named)) != len(named):
        raise _damaged("its groups do not name each parameter once")
    unstarted = facts.get("unstarted", [])
    if not isinstance(unstarted, list) or not all(name in named for name in unstarted):
        raise _damaged("it speaks of parameters that its groups do not name")
    if set(numbers) != set(named) or not all(isinstance(held, dict) for held in numbers.values()):
        raise _damaged("its numbers belong to other parameters than its groups")


def check_tensors(
    facts: dict[str, Any],
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, int],
    steps: int | None,
) -> None:
    """Refuse tensors that do not fit the facts or the parameters; see `saved.check_saved`."""
    held: dict[str, dict[str, Any]] = {name: dict(own) for name, own in facts["numbers"].items()}
    for full, tensor in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in held or key in held[name]:
            raise _damaged(f"it holds {full!r:.120}, which belongs to no parameter")
        held[name][key] = tensor
    moments = {
        name: group["options"].get("moments")
        for group in facts["groups"]
        for name in group["params"]
    }
    any_state = any(held.values())
    for name, state in held.items():
        if not any_state:
            break  # before the first step that was applied
        if name not in counts:
            raise _damaged(f"the model trains no parameter {name!r:.120}")
        if name in facts.get("unstarted", ()):
            if state:
                raise _damaged(f"{name} has a state, and is said to have none")
            continue
        _check_keys(facts["optimizer"], name, state, moments[name])
        for key, value in state.items():
            _check_value(f"{name}.{key}", key, value, counts[name], steps)


def _check_keys(kind: str, name: str, state: dict[str, Any], moments: Any) -> None:
    wanted: set[str] = set()
    library, _, optimizer = kind.partition(".")
    if optimizer == "SparseAdamW":
        if moments not in OWN_MOMENTS:
            raise _damaged(f"it has moments {moments!r:.80}")
        wanted = {"step", *OWN_MOMENTS[moments].keys}
    elif library == "torch" and optimizer in ("Adam", "AdamW"):
        wanted = {"step", "exp_avg", "exp_avg_sq"}
    elif library == "bitsandbytes" and "Adam" in optimizer and "AdEMA" not in optimizer:
        wanted = {"step", "state1", "state2"}
        if any(getattr(state.get(k), "dtype", None) == torch.uint8 for k in ("state1", "state2")):
            wanted |= {"absmax1", "absmax2", *TABLES}
    missing = sorted(wanted - set(state))
    if missing:
        raise _damaged(f"{name} lacks {', '.join(missing)}")
    if not state:
        raise _damaged(f"{name} has no state, others have")


def _check_value(what: str, key: str, value: Any, count: int, steps: int | None) -> None:
    if key == "step":
        _check_step(what, value, steps)
        return
    if not isinstance(value, Tensor):
        if key in ENTRIES or key in BLOCKS or key in TABLES:
            raise _damaged(f"{what} is no tensor")
        if isinstance(value, float) and not math.isfinite(value):
            raise _damaged(f"{what} is {value}")
        return
    if key in ENTRIES or key in BLOCKS or key in TABLES:
        size = count if key in ENTRIES else -(-count // BLOCK) if key in BLOCKS else 256
        dtypes = ENTRIES.get(key, (torch.float32,))
        if value.shape != (size,) or value.dtype not in dtypes:
            raise _damaged(
                f"{what} is {value.dtype} {tuple(value.shape)}, expected {size} numbers in "
                f"{' or '.join(str(dtype) for dtype in dtypes)}"
            )
    if value.is_floating_point() and value.numel():
        if not bool(torch.isfinite(value).all()):
            raise _damaged(f"{what} holds NaN or infinite numbers")
        second = key in NOT_NEGATIVE or (key == "state2" and value.dtype != torch.uint8)
        if second and bool((value < 0).any()):
            raise _damaged(f"{what} holds negative numbers")
        bound = LARGEST_GRADIENT if key in FIRST else LARGEST_GRADIENT**2 if key in SECOND else None
        if bound is not None and float(value.abs().max()) > 1.01 * bound:
            raise _damaged(f"{what} holds more than a gradient of {LARGEST_GRADIENT:g} can leave")


def _check_step(what: str, value: Any, steps: int | None) -> None:
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.dtype == torch.bool or value.is_complex():
            raise _damaged(f"{what} is no number")
        value = value.item()
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value < math.inf or value != int(value):
        raise _damaged(f"{what} is {value!r:.80}, expected a count of steps")
    if steps is not None and value > steps:
        raise _damaged(f"{what} is {value:g}, but only {steps} steps were taken")


def _damaged(problem: str) -> UserError:
    return UserError(f"the checkpoint's optimizer state is damaged: {problem}.")
