"""Whether a checkpoint is whole: its seal first, then every file that training would take.

`checkpoint.json` has a digest of every file, so damage is found whatever it does. The content is
looked at all the same, since a file can be whole and wrong. Checkpoints of older versions have no
seal; only their content can be looked at, which is said.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import TrainerState

from leanlift.adapters import CONFIG_NAME, open_adapter
from leanlift.errors import UserError
from leanlift.io.tensors import digest_of, read_json
from leanlift.optim import check_saved
from leanlift.training.checkpointing.loop_state import (
    check_numbers,
    check_random_state,
    check_scale,
    check_schedule,
    unpickle,
)
from leanlift.training.checkpointing.names import (
    FORMAT_VERSION,
    OPTIMIZER_FACTS,
    PICKLED,
    RANDOM,
    SCALE,
    SCHEDULE,
    SEAL,
    TRAINER_STATE,
    step_of,
)
from leanlift.training.checkpointing.parts import read_optimizer, read_random_state

logger = logging.getLogger("leanlift")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole.

    Attributes:
        path: its directory.
        step: optimizer steps taken.
        settings: of the run that wrote it; few where it is too old to know them.
        last: whether its run was to end with this step, which then has had no refresh.
    """

    path: Path
    step: int
    settings: dict[str, Any]
    last: bool


def check_checkpoint(path: Path) -> Checkpoint:
    """Look at every file of a checkpoint.

    Raises:
        UserError: it is no checkpoint, not whole, damaged, or holds no optimizer.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist: expected the directory of a checkpoint.")
    if not (path / TRAINER_STATE).is_file():
        raise UserError(f"{path} is no training checkpoint: it has no {TRAINER_STATE}.")
    settings = _check_seal(path)
    step, steps = _check_trainer_state(path)
    counts = _check_adapter(path)
    if not _has(path, OPTIMIZER_FACTS):
        raise UserError(
            f"{path} holds an adapter and no optimizer, as save_only_model leaves it, so no run "
            "can go on from it: start a new run, or take another checkpoint."
        )
    _check_optimizer(path, counts, step)
    _check_loop(path, step)
    return Checkpoint(path, step, settings or _old_settings(path), last=step >= steps)


def _check_seal(path: Path) -> dict[str, Any] | None:
    """The settings, after comparing every digest; None where an older version wrote no seal."""
    if not (path / SEAL).is_file():
        if any((path / name).exists() for name in (SCHEDULE, RANDOM)):
            raise UserError(f"{path} is not whole: it lacks {SEAL}.")
        logger.warning(
            "%s has no %s: an older version wrote it. Its content is checked, but damage that "
            "keeps it plausible cannot be seen, and its settings are not known.", path, SEAL
        )  # fmt: skip
        return None
    seal = read_json(path / SEAL)
    if not isinstance(seal, dict) or seal.get("digest") != digest_of_content(
        {key: value for key, value in seal.items() if key != "digest"}
    ):
        raise UserError(f"{path / SEAL} is damaged: its digest is another.")
    if seal.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"{path} has checkpoint format {seal.get('format_version')!r:.80}; this leanlift reads "
            f"format {FORMAT_VERSION}: upgrade leanlift."
        )
    if not isinstance(seal.get("files"), dict) or not isinstance(seal.get("settings"), dict):
        raise UserError(f"{path / SEAL} is damaged: it lacks files or settings.")
    if step_of(path) not in (-1, seal.get("step")):
        raise UserError(f"{path} is the checkpoint of step {seal.get('step')!r:.80}: rename it so.")
    for name, digest in seal["files"].items():
        try:
            same = digest_of(path / name) == digest
        except OSError as error:
            raise UserError(f"{path} is not whole: {name} {_why(error)}.") from None
        if not same:
            raise UserError(f"{path} is damaged: {name} is not as it was written.")
    settings: dict[str, Any] = seal["settings"]
    return settings


def _old_settings(path: Path) -> dict[str, Any]:
    """What a checkpoint without a seal says of the run that wrote it."""
    batch = read_json(path / TRAINER_STATE)["train_batch_size"]
    mask = read_json(path / CONFIG_NAME).get("lift", {})
    return {"mask": mask, "loop": {"per_device_train_batch_size": batch}}


def _check_trainer_state(path: Path) -> tuple[int, int]:
    """The step a checkpoint is of and how many its run was to take, after looking at what Trainer
    will take from its state."""
    file = path / TRAINER_STATE
    state = read_json(file)
    known = {field.name for field in fields(TrainerState)}
    if not isinstance(state, dict) or not set(state) <= known:
        raise UserError(f"{file} is damaged, or of another version of transformers.")
    whole = {
        "global_step": 0, "max_steps": 1, "train_batch_size": 1, "num_train_epochs": 0,
    }  # fmt: skip
    numbers = ("epoch", "num_input_tokens_seen", "total_flos")
    fine = (
        all(type(state.get(k)) is int and state[k] >= least for k, least in whole.items())
        and all(_is_finite(state.get(key)) for key in numbers)
        and isinstance(state.get("log_history"), list)
        and all(isinstance(entry, dict) for entry in state["log_history"])
        and isinstance(state.get("stateful_callbacks", {}), dict)
        and isinstance(state.get("best_model_checkpoint"), (str, type(None)))
        and isinstance(state.get("best_global_step"), (int, type(None)))
        and isinstance(state.get("best_metric"), (int, float, type(None)))
        and step_of(path) in (-1, state["global_step"])
    )
    if not fine:
        raise UserError(f"{file} is damaged: it is not the state of step {max(0, step_of(path))}.")
    return state["global_step"], state["max_steps"]


def _check_adapter(path: Path) -> dict[str, int]:
    """Entries of each trained parameter."""
    with open_adapter(path) as adapter:
        return {f"{name}.values": adapter.layer(name).active.index.count for name in adapter.shapes}


def _check_optimizer(path: Path, counts: dict[str, int], step: int) -> None:
    if (path / OPTIMIZER_FACTS).is_file():
        check_saved(read_optimizer(path), counts, step)
        return
    state = unpickle(path / PICKLED[OPTIMIZER_FACTS])
    if not isinstance(state, dict) or not {"state", "param_groups"} <= set(state):
        raise UserError(f"{path / PICKLED[OPTIMIZER_FACTS]} holds no optimizer's state.")


def _check_loop(path: Path, step: int) -> None:
    """Schedule, random numbers, loss scale."""
    if not _has(path, SCHEDULE):
        raise UserError(f"{path} is not whole: it lacks the schedule, {SCHEDULE}.")
    if (path / SCHEDULE).is_file():
        check_schedule(read_json(path / SCHEDULE), step, str(path / SCHEDULE))
    else:
        file = path / PICKLED[SCHEDULE]
        check_numbers(unpickle(file), str(file))
    if not _has(path, RANDOM):
        raise UserError(f"{path} is not whole: it lacks the random numbers' state, {RANDOM}.")
    check_random_state(read_random_state(path), str(path))
    if (path / SCALE).is_file():
        check_scale(read_json(path / SCALE), str(path / SCALE))


def _has(path: Path, name: str) -> bool:
    return (path / name).is_file() or (path / PICKLED[name]).is_file()


def digest_of_content(content: Any) -> str:
    """The SHA-256 of what JSON says, whatever the order of its keys."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _is_finite(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < float("inf")


def _why(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"({error.strerror})"
