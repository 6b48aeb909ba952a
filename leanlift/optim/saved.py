"""Optimizer state as named tensors and plain numbers, so that a checkpoint needs no pickle.

The state of parameter `p` becomes tensors "<name of p>.<key>"; numbers, groups and the kind of
optimizer become a JSON-ready dictionary. Restoring goes by name, through the optimizer's own
`load_state_dict`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

from torch import Tensor
from torch.optim import Optimizer

from leanlift.errors import UserError
from leanlift.optim.validate import check_facts, check_tensors

PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class SavedState:
    """Everything that an optimizer's `state_dict` holds.

    Attributes:
        tensors: "<parameter>.<key>" -> tensor; no two overlap.
        facts: JSON-ready: "optimizer", "groups" (names of parameters, options), "numbers", and
            "unstarted", the parameters that never had a gradient, where others had.
    """

    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def saved_state(optimizer: Optimizer, named: Iterable[tuple[str, Tensor]]) -> SavedState | None:
    """The state of `optimizer` by the names of its parameters; None where it is not that plain.

    Args:
        optimizer: one whose state per parameter is tensors and numbers: every stock Adam is.
        named: `model.named_parameters()`.
    """
    optimizer = unwrap(optimizer)
    names = {id(parameter): name for name, parameter in named}
    groups: list[dict[str, Any]] = []
    numbers: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    shared: set[int] = set()
    begun = {names.get(id(p)) for p, state in optimizer.state.items() if state}
    for group in optimizer.param_groups:
        if any(id(parameter) not in names for parameter in group["params"]):
            return None
        options = {key: value for key, value in group.items() if key != "params"}
        if not all(_is_plain(value) for value in options.values()):
            return None
        groups.append({"params": [names[id(p)] for p in group["params"]], "options": options})
        for parameter in group["params"]:
            name = names[id(parameter)]
            numbers[name] = {}
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    place = value.data_ptr()  # several may lie in one buffer, apart
                    tensors[f"{name}.{key}"] = value.clone() if place in shared else value
                    shared.add(place)
                elif _is_plain(value):
                    numbers[name][key] = value
                else:
                    return None
    facts = {"optimizer": kind_of(optimizer), "groups": groups, "numbers": numbers}
    unstarted = [name for name, held in numbers.items() if not held and name not in begun]
    if begun and unstarted:
        facts["unstarted"] = unstarted
    return SavedState(tensors, facts)


def restore_state(
    optimizer: Optimizer, named: Iterable[tuple[str, Tensor]], saved: SavedState
) -> None:
    """Load `saved` into `optimizer`; every parameter gets the state that was saved by its name.

    Raises:
        UserError: the state of another kind of optimizer, of other parameters, with other options,
            or one that `check_saved` refuses. The optimizer is unchanged then.
    """
    optimizer = unwrap(optimizer)
    parameters = dict(named)
    names = {id(parameter): name for name, parameter in parameters.items()}
    check_facts(saved.facts)
    if saved.facts["optimizer"] != kind_of(optimizer):
        raise UserError(
            f"the checkpoint holds the state of {saved.facts['optimizer']}, this run uses "
            f"{kind_of(optimizer)}: resume with the optim that it was saved with."
        )
    here = [[names.get(id(p), "?") for p in group["params"]] for group in optimizer.param_groups]
    if here != [group["params"] for group in saved.facts["groups"]]:
        raise UserError(
            "the checkpoint's optimizer was made for other parameters or groups: resume with the "
            "model, targets and weight_decay that it was saved with."
        )
    check_saved(saved, {name: parameter.numel() for name, parameter in parameters.items()})
    places = {name: place for place, name in enumerate(name for group in here for name in group)}
    state: dict[int, dict[str, Any]] = {}
    for name, numbers in saved.facts["numbers"].items():
        state[places[name]] = dict(numbers)
    for full, tensor in saved.tensors.items():
        name, _, key = full.rpartition(".")
        state[places[name]][key] = tensor
    groups = []
    for group, kept in zip(optimizer.param_groups, saved.facts["groups"], strict=True):
        options = {key: _like(group.get(key), value) for key, value in kept["options"].items()}
        _check_options(group, options)
        own = {key: value for key, value in group.items() if key != "params"}
        groups.append({**own, **options, "params": [places[name] for name in kept["params"]]})
    full_state = {place: held for place, held in state.items() if held}
    optimizer.load_state_dict({"state": full_state, "param_groups": groups})


def _check_options(group: dict[str, Any], saved: dict[str, Any]) -> None:
    """The options of a group must be those of this run, all but the scheduled learning rate: what
    one of them would otherwise be loaded over is what the user has asked for."""
    lr = saved.get("lr")
    if not _is_number(lr) or not 0 <= lr < math.inf:
        raise UserError(f"the checkpoint's optimizer is damaged: its lr is {lr!r:.80}.")
    for key, value in saved.items():
        if key != "lr" and key in group and group[key] != value:
            raise UserError(
                f"the checkpoint's optimizer has {key}={value!r:.80}, this run {group[key]!r:.80}: "
                "resume with the settings that it was saved with."
            )


def check_saved(saved: SavedState, counts: Mapping[str, int], steps: int | None = None) -> None:
    """Refuse a state that no optimizer can have left for these parameters.

    Args:
        saved: as it was read from files that anyone may have written.
        counts: entries of each trained parameter, by name.
        steps: how many steps were taken at most; None where that is not known.

    Raises:
        UserError: facts of another form, tensors that are missing, too many, of another shape or
            dtype, numbers that are not finite, negative second moments, or more steps than taken.
    """
    check_facts(saved.facts)
    check_tensors(saved.facts, saved.tensors, counts, steps)


def unwrap(optimizer: Optimizer) -> Optimizer:
    """What accelerate's wrapper holds, or the optimizer itself."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner if isinstance(inner, Optimizer) else optimizer


def kind_of(optimizer: Optimizer) -> str:
    """Which optimizer this is, by the module and name of its class."""
    kind = type(optimizer)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(item) for item in value)
    return isinstance(value, PLAIN)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _like(present: Any, value: Any) -> Any:
    """JSON has lists only: a tuple where the optimizer has a tuple."""
    return tuple(value) if isinstance(present, tuple) and isinstance(value, list) else value
