"""Schedule, random numbers and loss scale of a training loop, as plain JSON.

Trainer pickles the three. Read with `weights_only` that is safe, but a damaged pickle fails in a
dozen ways, and the state of a schedule is written over its attributes unseen. Here each is numbers
and strings that can be looked at before they are used: a random state is tried on a generator of
its own, a schedule is held against the schedule of the run. Checkpoints that still have the
pickled forms are read too.
"""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.trainer_pt_utils import safe_globals

from leanlift.errors import UserError, first_line

MERSENNE = 624
"""Words of a Mersenne twister's state."""


# --- random numbers ------------------------------------------------------------------------


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every generator that training draws from, JSON-ready."""
    kind, words, place, has_gauss, gauss = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": [kind, np.asarray(words).tolist(), int(place), int(has_gauss), float(gauss)],
        "cpu": _to_hex(torch.random.get_rng_state()),
        "cuda": _to_hex(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def check_random_state(state: Any, what: str) -> None:
    """Refuse what no generator can be set to; tries it on generators that nobody uses.

    Raises:
        UserError: `what` says where it is from.
    """
    try:
        random.Random().setstate(_python_state(state))
        np.random.RandomState().set_state(_numpy_state(state))
        torch.Generator().set_state(_from_hex(state["cpu"]))
        if state["cuda"] is not None:
            _from_hex(state["cuda"])
    except Exception as error:  # each library has its own kinds
        raise UserError(f"{what} holds no state of random numbers: {_say(error)}") from None


def restore_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Set every generator; `state` has been checked.

    Raises:
        UserError: a state of the GPU's that this GPU's generator does not take.
    """
    random.setstate(_python_state(state))
    np.random.set_state(_numpy_state(state))
    torch.random.set_rng_state(_from_hex(state["cpu"]))
    if device.type == "cuda" and state["cuda"] is not None:
        try:
            torch.cuda.set_rng_state(_from_hex(state["cuda"]), device)
        except RuntimeError as error:
            raise UserError(
                f"the checkpoint's state of the GPU's random numbers does not fit: {_say(error)}"
            ) from None


def pickled_random_state(path: Path) -> dict[str, Any]:
    """What Trainer pickles, in the form of `random_state`.

    Raises:
        UserError: unreadable, or something else.
    """
    found = unpickle(path)
    try:
        kind, words, place, has_gauss, gauss = found["numpy"]
        cuda = found.get("cuda")
        return {
            "python": found["python"],
            "numpy": [kind, np.asarray(words).tolist(), int(place), int(has_gauss), float(gauss)],
            "cpu": _to_hex(found["cpu"]),
            "cuda": _to_hex(cuda) if isinstance(cuda, torch.Tensor) else None,
        }
    except Exception as error:
        raise UserError(f"{path} holds no state of random numbers: {_say(error)}") from None


def _python_state(state: Any) -> tuple[Any, ...]:
    version, words, gauss = state["python"]
    if gauss is not None and not _is_finite(gauss):
        raise ValueError(f"gauss_next is {gauss!r:.80}")
    return version, tuple(words), gauss


def _numpy_state(state: Any) -> tuple[Any, ...]:
    kind, words, place, has_gauss, gauss = state["numpy"]
    fits = type(place) is int and 0 <= place <= MERSENNE and has_gauss in (0, 1)
    if kind != "MT19937" or not fits or not _is_finite(gauss):
        raise ValueError("numpy's is not that of a Mersenne twister")
    if len(words) != MERSENNE or not all(type(word) is int for word in words):
        raise ValueError(f"numpy's has not {MERSENNE} words")
    return kind, np.array(words, dtype=np.uint32), place, int(has_gauss), float(gauss)


def _to_hex(state: torch.Tensor) -> str:
    return bytes(state.cpu().numpy()).hex()


def _from_hex(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


# --- schedule and loss scale ---------------------------------------------------------------


def plain(state: dict[str, Any]) -> dict[str, Any] | None:
    """A state as JSON gives it back; None where it is not numbers, strings, lists and mappings."""
    try:
        kept: dict[str, Any] = json.loads(json.dumps(state))
    except (TypeError, ValueError):
        return None
    return kept if _same_form(_listed(state), kept) else None


def check_numbers(state: Any, what: str) -> None:
    """Refuse a state that is no mapping, or holds a NaN; infinity is a schedule's "none so far".

    Raises:
        UserError: `what` says where it is from.
    """
    if not isinstance(state, dict) or any(number != number for number in _numbers(state)):
        raise UserError(f"{what} is damaged: expected a mapping of numbers, got {state!r:.80}.")


def check_schedule(state: Any, steps: int, what: str) -> None:
    """Refuse a schedule whose learning rates cannot be, or that has gone further than the run.

    Raises:
        UserError: `what` says where it is from.
    """
    check_numbers(state, what)
    rates = [rate for key in ("base_lrs", "_last_lr") for rate in _list(state.get(key))]
    if not all(_is_finite(rate) and rate >= 0 for rate in rates):
        raise UserError(f"{what} is damaged: a learning rate is not a number of at least 0.")
    last = state.get("last_epoch")
    if type(last) is not int or not 0 <= last <= steps:
        raise UserError(
            f"{what} is damaged: it has gone {last!r:.80} steps, and the run {steps} of them."
        )


def check_same_schedule(own: dict[str, Any], state: dict[str, Any], what: str) -> None:
    """Refuse the state of another kind of schedule, or of another peak learning rate.

    Args:
        own: the state of this run's schedule before its first step.
        state: the one to load.
        what: where it is from.

    Raises:
        UserError: it does not fit.
    """
    if not _same_form(_listed(own), _listed(state)):
        raise UserError(
            f"{what} belongs to another kind of schedule: resume with the lr_scheduler_type that "
            "the checkpoint was saved with."
        )
    if own.get("base_lrs") != state.get("base_lrs"):
        raise UserError(
            f"{what} has a learning_rate of {state.get('base_lrs')!r:.80}, this run "
            f"{own.get('base_lrs')!r:.80}: resume with the one that it was saved with."
        )


def check_scale(state: Any, what: str) -> None:
    """Refuse a loss scale that cannot be.

    Raises:
        UserError: `what` says where it is from.
    """
    check_numbers(state, what)
    if not all(_is_finite(number) and number >= 0 for number in _numbers(state)):
        raise UserError(f"{what} is damaged: a loss scale is not a finite number.")
    if state and not state.get("scale", 0) > 0:
        raise UserError(f"{what} is damaged: its loss scale is {state.get('scale')!r:.80}.")


def unpickle(path: Path) -> Any:
    """What torch has saved, tensors and plain values alone, on the CPU.

    Raises:
        UserError: unreadable, or something that would have to run code.
    """
    try:
        with safe_globals():
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and torch each have their own kinds
        raise UserError(f"{path} cannot be read: {_say(error)}") from None


def _same_form(own: Any, other: Any) -> bool:
    """Whether two states have the same keys, lengths and types; what is None may be anything."""
    if isinstance(own, dict):
        return (
            isinstance(other, dict)
            and own.keys() == other.keys()
            and all(_same_form(own[key], other[key]) for key in own)
        )
    if isinstance(own, list):
        return (
            isinstance(other, list) and len(own) == len(other) and all(map(_same_form, own, other))
        )
    if own is None or other is None:
        return True
    if isinstance(own, bool) or isinstance(other, bool):
        return isinstance(own, bool) and isinstance(other, bool)
    if isinstance(own, (int, float)):
        return isinstance(other, (int, float))
    return type(own) is type(other)


def _listed(state: Any) -> Any:
    """Tuples as JSON gives them back."""
    if isinstance(state, dict):
        return {key: _listed(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_listed(value) for value in state]
    return state


def _numbers(state: Any) -> list[float]:
    if isinstance(state, dict):
        return [number for value in state.values() for number in _numbers(value)]
    if isinstance(state, (list, tuple)):
        return [number for value in state for number in _numbers(value)]
    return [state] if isinstance(state, (int, float)) and not isinstance(state, bool) else []


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < math.inf


def _say(error: Exception) -> str:
    return first_line(error)[:200]
