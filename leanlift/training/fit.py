"""Choosing settings with which a run fits a card: first what is free, last what costs quality.

A change is taken only if it gains something worth its price: at least a hundredth of what is
needed. What is ordered (the rows of a batch, the density) is not walked through but bisected, and
before anything is planned it is asked whether the least settings could fit at all: their weights
alone say so in a moment.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.format import parse_card, short_name, size
from leanlift.plan import MOMENTS, Known, MemoryPlan
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.batches import Batch, Batches
from leanlift.training.plan import FakeBase, least_of, plan_of

__all__ = ["Change", "Fit", "Taken", "changes", "fit", "parse_card", "useful_changes"]

Settings = tuple[RunArguments, LiftSFTConfig]
LEAST_DENSITY = 0.01
LEAST_GAIN = 0.01
"""The share of what is needed that a change must save."""

CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Names of one setting: the later one is transformers' since 5.24, and wins where both are set."""


@dataclass(frozen=True)
class Change:
    """One change of settings.

    Attributes:
        keys: the settings and their new values, as they stand in a file.
        cost: in words.
    """

    keys: dict[str, Any]
    cost: str

    def __call__(self, settings: Settings) -> Settings:
        args, sft = settings
        run = {key: value for key, value in self.keys.items() if hasattr(args, key)}
        loop = {key: value for key, value in self.keys.items() if key not in run}
        if "gradient_checkpointing" in loop:
            on = loop["gradient_checkpointing"]
            loop |= {name: on for name in CHECKPOINTING if hasattr(sft, name)}
        return replace(args, **run) if run else args, replace(sft, **loop) if loop else sft

    def possible(self, settings: Settings) -> bool:
        """Whether a run could be made with it: an update in the backward pass takes one micro-batch
        per step, and it and 16-bit offsets an optimizer of ours."""
        sft = settings[1]
        ours = str(getattr(sft.optim, "value", sft.optim)) in SPARSE_OPTIMIZERS
        if "optim_in_backward" in self.keys:
            backward = self.keys["optim_in_backward"]
            return not backward or (ours and sft.gradient_accumulation_steps == 1)
        return ours or "values_dtype" not in self.keys

    @property
    def named(self) -> str:
        """The settings as flags are written."""
        return " and ".join(f"{key}={_text(value)}" for key, value in self.keys.items())

    def __str__(self) -> str:
        return f"{self.named}, {self.cost}"


@dataclass(frozen=True)
class Taken:
    """A change that was made: what was needed before, and after."""

    change: Change
    before: int
    after: int

    @property
    def saved(self) -> int:
        """Bytes that the change saves."""
        return self.before - self.after

    def __str__(self) -> str:
        return f"{self.change}: {size(self.after)} ({size(self.saved)} less)"


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and the way there.

    Attributes:
        args, sft: the settings.
        plan: what they need.
        taken: the changes.
    """

    args: RunArguments
    sft: LiftSFTConfig
    plan: MemoryPlan
    taken: tuple[Taken, ...]

    @property
    def steps(self) -> tuple[str, ...]:
        """A line per change: what was changed, what it costs, what it brought."""
        return tuple(map(str, self.taken))


class _Search:
    """Plans of one base for one card.

    Args:
        gib: of the card.
        cuda: whether it is one.
        batches: how long rows are; None: as long as the settings allow.
        say: is told what is being tried.
    """

    def __init__(
        self, gib: float, cuda: bool, batches: Batches | None, say: Callable[[str], None]
    ) -> None:
        self.gib, self.cuda, self.batches, self.say = gib, cuda, batches, say
        self.known: Known = {}

    def plan(self, settings: Settings, trying: str) -> MemoryPlan:
        self.say(f"trying {trying}")
        return plan_of(*settings, self.cuda, _smaller(self.batches, settings[1]), self.known)

    def fits(self, plan: MemoryPlan) -> bool:
        return plan.fits(self.gib)


def fit(
    args: RunArguments,
    sft: LiftSFTConfig,
    gib: float,
    cuda: bool = True,
    say: Callable[[str], None] = lambda line: None,
    batches: Batches | None = None,
) -> Fit:
    """Change settings in a fixed order until the plan fits a card of `gib` GiB.

    Args:
        args, sft: the settings as they are.
        gib: of the card.
        cuda: whether the run is on a GPU.
        say: is told what is being tried, a line each.
        batches: how long rows are; None: as long as `max_length` allows.

    Raises:
        UserError: nothing fits; says how much is missing.
    """
    settings, search = (args, sft), _Search(gib, cuda, batches, say)
    _refuse_what_cannot_fit(settings, search)
    plan = search.plan(settings, "the settings as they are")
    taken: list[Taken] = []
    for choices in ordered_changes(args, sft, cuda):
        if search.fits(plan):
            break
        elsewhere = plan.peak_phase != "evaluate"
        if elsewhere and "per_device_eval_batch_size" in choices[0].keys:
            continue
        if not choices[0].possible(settings):
            continue
        change, changed = _best(choices, settings, plan, search)
        if plan.needed - changed.needed >= LEAST_GAIN * plan.needed or search.fits(changed):
            taken.append(Taken(change, plan.needed, changed.needed))
            settings, plan = change(settings), changed
    if not search.fits(plan):
        _refuse(args, search, plan.needed)
    return Fit(*settings, plan, tuple(taken))


def useful_changes(
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: MemoryPlan,
    cuda: bool = True,
    most: int = 3,
    say: Callable[[str], None] = lambda line: None,
) -> list[Taken]:
    """The changes that save most, each on its own, planned: the largest first, and last what costs
    quality.

    Args:
        args, sft, cuda: what `plan` was made for.
        plan: what is needed now.
        most: how many.
        say: is told what is being tried.
    """
    search = _Search(0.0, cuda, None, say)
    choices = [_half(group, args) for group in ordered_changes(args, sft, cuda)]
    choices += [_shorter(sft)] if (sft.max_length or 0) > 512 else []
    choices = [change for change in choices if change.possible((args, sft))]
    promising = sorted(choices, key=lambda change: -_at_most(change, plan))[: most + 1]
    found = []
    for change in promising:
        changed = search.plan(change((args, sft)), change.named)
        found.append(Taken(change, plan.needed, changed.needed))
    worth = [taken for taken in found if taken.saved >= LEAST_GAIN * plan.needed]
    return sorted(worth, key=lambda taken: ("quality" in taken.change.cost, -taken.saved))[:most]


def changes(args: RunArguments, sft: LiftSFTConfig, cuda: bool = True) -> Iterator[Any]:
    """What to try against a peak, cheapest first, each on its own: (what and at what cost, how)."""
    for choices in ordered_changes(args, sft, cuda):
        if "per_device_eval_batch_size" not in choices[0].keys:
            for change in choices:
                if change.possible((args, sft)):
                    yield str(change), change


def ordered_changes(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool = True
) -> Iterator[tuple[Change, ...]]:
    """Changes against a peak, cheapest first; of one tuple only one is made, and each needs less
    than the one before. They are made one after the other, where they are possible by then. On a
    CPU (`cuda` False) nothing can be moved to one."""
    optim = str(getattr(sft.optim, "value", sft.optim))
    if not sft.fp16 and ("8bit" not in optim or optim not in SPARSE_OPTIMIZERS):
        optim = "sparse_adamw_8bit"
        yield (Change({"optim": optim}, "moments in 8 bits instead of 32: no loss measured"),)
    if args.values_dtype == "float32" and optim in SPARSE_OPTIMIZERS and not sft.fp16:
        yield (
            Change(
                {"values_dtype": "bfloat16"},
                "offsets in 16 bits, rounded stochastically: no loss measured",
            ),
        )
    if str(getattr(sft.eval_strategy, "value", sft.eval_strategy)) != "no":
        sizes = _halves(sft.per_device_eval_batch_size)
        if sizes:
            cost = "the same evaluation in smaller batches"
            yield tuple(Change({"per_device_eval_batch_size": n}, cost) for n in sizes)
    if not sft.gradient_checkpointing:
        yield (Change({"gradient_checkpointing": True}, "costs a second forward pass"),)
    smaller = tuple(_smaller_batches(sft))
    if smaller:
        yield smaller
    if not args.quantize_embeddings:
        yield (
            Change(
                {"quantize_embeddings": True},
                "embedding and head in INT8 while training: a little rounding",
            ),
        )
    if cuda and not args.embedding_on_cpu and not _tied(args, sft):
        yield (Change({"embedding_on_cpu": True}, "rows are looked up on the CPU: a little time"),)
    if cuda and not sft.activation_offloading:
        yield (Change({"activation_offloading": True}, "costs transfers to the CPU"),)
    if not sft.optim_in_backward and not sft.fp16:
        yield (
            Change(
                {"optim_in_backward": True, "max_grad_norm": 0.0},
                "gives up gradient clipping",
            ),
        )
    if args.rank_budget is None and args.density > LEAST_DENSITY:
        cost = "fewer trained entries: this costs quality"
        yield tuple(Change({"density": d}, cost) for d in _densities(args.density))


# --- the search -------------------------------------------------------------------------------


NEARLY, CLEARLY = 0.85, 1.05
"""Share of a card from which the least settings are planned before any others, and the share that
they must need to be refused by that: a change may cost a small model more than it saves."""


def _refuse_what_cannot_fit(settings: Settings, search: _Search) -> None:
    """Ask whether the weights of the least settings fit, and all of a step where they nearly fill
    the card.

    Raises:
        UserError: they do not.
    """
    for choices in ordered_changes(*settings, search.cuda):
        if choices[-1].possible(settings):
            settings = choices[-1](settings)
    search.say("asking whether the least settings fit")
    (least, moment), card = least_of(*settings, search.cuda), search.gib * 2**30
    if least > card:
        _refuse(settings[0], search, least, MOMENTS[moment])
    if least > NEARLY * card:
        plan = search.plan(settings, "the least settings")
        if plan.needed > CLEARLY * card:
            _refuse(settings[0], search, plan.needed)


def _refuse(args: RunArguments, search: _Search, needed: int, how: str = "") -> None:
    raise UserError(
        f"{short_name(args.model_name_or_path)} does not fit {search.gib:g} GiB: the least setting "
        f"needs {size(needed)}{how and ' ' + how}, {size(needed - search.gib * 2**30)} more than "
        "there is; take a smaller base" + ("." if how else ", or shorten max_length.")
    )


def _best(
    choices: tuple[Change, ...], settings: Settings, plan: MemoryPlan, search: _Search
) -> tuple[Change, MemoryPlan]:
    """The first of ordered choices that fits, looked for where a straight line between what is
    known has it; the last one where none does.

    Args:
        choices: each needs less than the one before.
        settings: without any of them.
        plan: of those, which does not fit.
        search: makes the plans.
    """
    low, high = -1, len(choices) - 1
    above, found = plan, (choices[-1], search.plan(choices[-1](settings), choices[-1].named))
    if not search.fits(found[1]):
        return found
    while high - low > 1:
        over, span = above.needed - search.gib * 2**30, above.needed - found[1].needed
        guess = low + math.ceil((high - low) * over / max(1, span))
        middle = min(max(guess, low + 1), high - 1)
        made = search.plan(choices[middle](settings), choices[middle].named)
        if search.fits(made):
            high, found = middle, (choices[middle], made)
        else:
            low, above = middle, made
    return found


def _smaller(batches: Batches | None, sft: LiftSFTConfig) -> Batches | None:
    """Batches of known lengths with as many rows as the settings now say."""
    if batches is None:
        return None
    train = _of_rows(batches.train, sft.per_device_train_batch_size, sft.max_length)
    return Batches(train, _of_rows(batches.eval, sft.per_device_eval_batch_size, sft.max_length))


def _of_rows(batch: Batch | None, rows: int, longest: int | None) -> Batch | None:
    if batch is None:
        return None
    tokens = min(batch.tokens, longest or batch.tokens)
    if (rows, tokens) == (batch.rows, batch.tokens):
        return batch
    trained = None if batch.trained is None else min(batch.trained, rows * tokens)
    return Batch(rows, tokens, trained, batch.padded and rows > 1)


def _at_most(change: Change, plan: MemoryPlan) -> float:
    """What a change may save, from the bytes that it is about: which ones are worth a plan."""
    held, entries = plan.categories, ("index", "values", "gradients", "optimizer state")
    activations = held["activations and workspace"]
    return {
        "density": sum(held[name] for name in entries) / 2,
        "quantize_embeddings": held["embeddings and head"] / 2,
        "embedding_on_cpu": held["embeddings and head"] / 2,
        "optim": 0.75 * held["optimizer state"],
        "values_dtype": (held["values"] + held["gradients"]) / 2,
        "optim_in_backward": held["gradients"],
        "gradient_checkpointing": activations,
        "activation_offloading": activations / 2,
        "per_device_train_batch_size": activations,
        "max_length": activations / 2,
        "per_device_eval_batch_size": plan.peak - plan.phases["train"],
    }[next(iter(change.keys))]


# --- values -----------------------------------------------------------------------------------


def _halves(number: int) -> list[int]:
    found = []
    while number > 1:
        number = number // 2 if number % 2 == 0 else 1
        found.append(number)
    return found


def _smaller_batches(sft: LiftSFTConfig) -> Iterator[Change]:
    """The same batch in more pieces. An update in the backward pass cannot be in pieces."""
    rows, times = sft.per_device_train_batch_size, sft.gradient_accumulation_steps
    for fewer in _halves(rows):
        keys: dict[str, Any] = {
            "per_device_train_batch_size": fewer,
            "gradient_accumulation_steps": times * rows // fewer,
        }
        if sft.optim_in_backward:
            keys["optim_in_backward"] = False
        yield Change(keys, "the same batch in more pieces: a little time")


def _densities(density: float) -> list[float]:
    """Smaller densities down to the least, in ten steps."""
    steps = 10
    found = [density - (density - LEAST_DENSITY) * i / steps for i in range(1, steps)]
    rounded = [float(f"{value:.2g}") for value in found]
    return [*(d for d in dict.fromkeys(rounded) if LEAST_DENSITY < d < density), LEAST_DENSITY]


def _half(choices: tuple[Change, ...], args: RunArguments) -> Change:
    """The most that choices offer; of densities half of what there is."""
    last = choices[-1]
    if "density" not in last.keys:
        return last
    return replace(last, keys={"density": max(LEAST_DENSITY, args.density / 2)})


def _shorter(sft: LiftSFTConfig) -> Change:
    length = (sft.max_length or 2048) // 2
    return Change({"max_length": length}, "rows that are longer are cut")


def _text(value: Any) -> str:
    return (
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )


def _tied(args: RunArguments, sft: LiftSFTConfig) -> bool:
    remote = bool(sft.trust_remote_code)
    return FakeBase.of(args.model_name_or_path, None, remote, args.model_revision).tied
