"""What a checkpoint has beside the adapter: the state of the optimizer and of the training loop.

As safetensors and JSON. What is not plain (an optimizer or a schedule from elsewhere) is pickled,
as Trainer does, and read by torch's restricted unpickler, as are checkpoints of older versions.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanlift.errors import UserError, first_line
from leanlift.io.tensors import open_tensor_file, read_json, write_json, write_tensors
from leanlift.optim import SavedState, check_saved, restore_state, saved_state
from leanlift.processes import is_first, of_all, rank
from leanlift.training.checkpointing.loop_state import (
    check_same_schedule,
    pickled_random_state,
    plain,
    random_state,
    restore_random_state,
    unpickle,
)
from leanlift.training.checkpointing.names import (
    OPTIMIZER_FACTS,
    OPTIMIZER_TENSORS,
    PICKLED,
    RANDOM,
    SCALE,
    SCHEDULE,
    random_name,
)

Named = Iterable[tuple[str, nn.Parameter]]

# --- optimizer -----------------------------------------------------------------------------


def save_optimizer(directory: Path, optimizer: Any, named: Named) -> None:
    """Write the optimizer's state, by the names of the parameters."""
    parameters = dict(named)
    saved = saved_state(optimizer, parameters.items())
    if saved is None:
        torch.save(optimizer.state_dict(), directory / PICKLED[OPTIMIZER_FACTS])
        return
    check_saved(saved, {name: parameter.numel() for name, parameter in parameters.items()})
    write_tensors(directory / OPTIMIZER_TENSORS, saved.tensors)
    write_json(directory / OPTIMIZER_FACTS, saved.facts)


def load_optimizer(directory: Path, optimizer: Any, named: Named, device: torch.device) -> None:
    """Give the optimizer the state of a checkpoint.

    Raises:
        UserError: the state is of another optimizer, or cannot be read.
    """
    if (directory / OPTIMIZER_FACTS).is_file():
        saved = read_optimizer(directory)
        if device.type == "cpu":  # torch would train in the file's own pages
            saved = SavedState({k: t.clone() for k, t in saved.tensors.items()}, saved.facts)
        restore_state(optimizer, named, saved)
        return
    file = directory / PICKLED[OPTIMIZER_FACTS]
    state = unpickle(file)
    try:
        optimizer.load_state_dict(state)
    except Exception as error:  # torch has no one kind for a state that does not fit
        raise UserError(
            f"{file} does not fit this run's optimizer ({first_line(error).rstrip('.')}): resume "
            "with the optim that it was saved with."
        ) from None


def read_optimizer(path: Path) -> SavedState:
    """The optimizer's state of a checkpoint, not yet looked at.

    Raises:
        UserError: missing or unreadable.
    """
    with open_tensor_file(path / OPTIMIZER_TENSORS) as opened:
        tensors = {name: opened.get(name) for name in sorted(opened.names)}
    return SavedState(tensors, read_json(path / OPTIMIZER_FACTS))


# --- loop ----------------------------------------------------------------------------------


def save_schedule(directory: Path, schedule: Any) -> None:
    """Write the learning rate's schedule."""
    state = plain(schedule.state_dict())
    if state is None:
        torch.save(schedule.state_dict(), directory / PICKLED[SCHEDULE])
    else:
        write_json(directory / SCHEDULE, state)


def load_schedule(directory: Path, schedule: Any) -> None:
    """Give the schedule the state of a checkpoint.

    Raises:
        UserError: it is of another schedule.
    """
    own: Any = schedule.state_dict()
    if (directory / SCHEDULE).is_file():
        file, own = directory / SCHEDULE, plain(own) or {}
        state = read_json(file)
    else:
        file = directory / PICKLED[SCHEDULE]
        state = unpickle(file)
    check_same_schedule(own, state, str(file))
    schedule.load_state_dict(state)


def save_random_state(directory: Path, device: torch.device) -> None:
    """Write the state of all generators of random numbers that training uses, of each process."""
    states = of_all(random_state(device))
    if is_first():
        for number, state in enumerate(states):
            write_json(directory / random_name(number), state)


def load_random_state(directory: Path, device: torch.device) -> None:
    """Put the generators of this process back to where they were."""
    restore_random_state(read_random_state(directory, rank()), device)


def read_random_state(path: Path, number: int = 0) -> dict[str, Any]:
    """The random numbers' state of a checkpoint, in either form, of a process by its number.

    Raises:
        UserError: missing or unreadable.
    """
    file = path / random_name(number)
    if number or file.is_file():
        state: dict[str, Any] = read_json(file)
        return state
    return pickled_random_state(path / PICKLED[RANDOM])


def save_scale(directory: Path, scaler: Any) -> None:
    """Write the loss scale of fp16; nothing where there is none."""
    if scaler is not None:
        write_json(directory / SCALE, scaler.state_dict())


def load_scale(directory: Path, scaler: Any) -> None:
    """Give the scaler its scale; of an older checkpoint, as Trainer does.

    Raises:
        UserError: the checkpoint lacks it.
    """
    if scaler is None:
        return
    if (directory / SCALE).is_file():
        scaler.load_state_dict(read_json(directory / SCALE))
    elif (directory / "scaler.pt").is_file():
        scaler.load_state_dict(unpickle(directory / "scaler.pt"))
    else:
        raise UserError(f"{directory} lacks the loss scale of fp16: it is not whole.")
