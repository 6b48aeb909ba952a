"""Settings for a model, rows and a card, from what the rows are like and what the card holds.

Nothing is guessed that can be looked at: lengths come from the rows, what fits comes from a plan.
What is for a person to say is the purpose, which decides how long and how fast to train.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from leanlift.defaults import command_defaults
from leanlift.errors import UserError
from leanlift.format import count, share, short_name, size
from leanlift.plan import MemoryPlan
from leanlift.plan.cards import card_of_size
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.batches import Batches
from leanlift.training.changes import Taken
from leanlift.training.faster import Bought
from leanlift.training.fit import fit
from leanlift.training.look import Look
from leanlift.training.plan import plan_of
from leanlift.training.recipe import Section


@dataclass(frozen=True)
class Purpose:
    """What somebody wants of a model, in words; the settings that follow, and a reason of each."""

    what: str
    keys: Mapping[str, Any]
    why: Mapping[str, str]


PURPOSES = {
    "answers": Purpose(
        "answer as the rows do: a task, a subject",
        {"num_train_epochs": 3, "learning_rate": 2e-4, "density": 0.05},
        {
            "num_train_epochs": "every row is seen three times",
            "learning_rate": "of the paper's runs on a 7B model",
            "density": "5 % of each matrix is trained",
        },
    ),
    "style": Purpose(
        "answer as before, in another style or format",
        {"num_train_epochs": 2, "learning_rate": 1e-4, "density": 0.02},
        {
            "num_train_epochs": "a style is learned sooner",
            "learning_rate": "half of what answers take",
            "density": "2 %: less to learn, less memory",
        },
    ),
    "text": Purpose(
        "continue texts like these",
        {"num_train_epochs": 1, "learning_rate": 1e-4, "density": 0.05},
        {
            "num_train_epochs": "twice, and texts are learned by heart",
            "learning_rate": "half of what answers take",
            "density": "5 % of each matrix is trained",
        },
    ),
}
"""Modest settings, to start from: only the first ones are the paper's."""


@dataclass(frozen=True)
class Proposal:
    """Settings for a run.

    Attributes:
        args, sft: the settings.
        plan: what they need.
        taken: what was changed to fit the card.
        bought: what was changed after that, for time.
        card: GiB; None: a run on the CPU.
        sections: the settings as a file has them, with reasons.
    """

    args: RunArguments
    sft: LiftSFTConfig
    plan: MemoryPlan
    taken: tuple[Taken, ...]
    bought: tuple[Bought, ...]
    card: float | None
    sections: tuple[Section, ...]

    def lines(self, found: Look) -> list[str]:
        """What is proposed for the rows, in at most 80 columns."""
        length, plan = self.sft.max_length or 0, self.plan
        rows = self.sft.per_device_train_batch_size * self.sft.gradient_accumulation_steps
        steps = -(-found.rows // rows) * self.sft.num_train_epochs
        needed = f"needs {size(plan.needed)}"
        if self.card is None:
            where = f"on the CPU: {needed} for tensors"
        else:
            free = size(self.card * 2**30 - plan.needed)
            where = f"on a card of {self.card:g} GB: {needed}, {free} free"
        lines = [
            f"      max_length {length:,} cuts {count(found.cut(length))} of them",
            "",
            f"Run   {short_name(plan.model)}: {count(plan.entries)} of {count(plan.weights)} "
            "weights trained",
            f"      {count(steps)} steps of {rows} rows, {self.sft.num_train_epochs:g} epochs",
            f"      {where}",
        ]
        for step in self.taken:
            lines += [f"      {step.change.named}"]
            lines += [f"        saves {size(step.saved)}: {step.change.cost}"]
        for each in self.bought:
            lines += [f"      {each.change.named}"]
            lines += wrap(each.why, 78, initial_indent=" " * 8, subsequent_indent=" " * 8)
        return lines


def propose(
    model: str,
    data: str,
    found: Look,
    purpose: str,
    card: float | None,
    output_dir: str,
    say: Callable[[str], None] = lambda line: None,
) -> Proposal:
    """Settings with which the rows are trained as the purpose wants it, on this card.

    Args:
        model, data: of the run.
        found: what the rows are like.
        purpose: a key of `PURPOSES`.
        card: GiB; None: on the CPU.
        output_dir: of the run.
        say: is told what is being tried.

    Raises:
        UserError: nothing fits the card, or there is no such purpose.
    """
    if purpose not in PURPOSES:
        raise UserError(f"expected a purpose among {', '.join(PURPOSES)}, got {purpose!r}.")
    wanted, length = PURPOSES[purpose], found.max_length
    base: dict[str, Any] = {"model_name_or_path": model, "dataset_name": data}
    base["density"] = wanted.keys["density"]
    loop = {key: wanted.keys[key] for key in ("num_train_epochs", "learning_rate")}
    loop |= {"max_length": length, "output_dir": output_dir, "save_total_limit": 2}
    defaults = command_defaults({**base, **loop})
    base["values_dtype"] = defaults.pop("values_dtype")
    args = RunArguments(**base)
    sft = LiftSFTConfig(**{**loop, **defaults, "use_cpu": True})  # here it is only planned
    batches = Batches(found.worst(length))
    taken, bought = tuple[Taken, ...](), tuple[Bought, ...]()
    if card is None:
        plan = plan_of(args, sft, False, batches)
        defaults["use_cpu"] = True
    else:
        fitted = fit(args, sft, card, True, say, batches, card_of_size(card))
        args, sft, plan = fitted.args, fitted.sft, fitted.plan
        taken, bought = fitted.taken, fitted.bought
    steps = [*(step.change for step in taken), *(each.change for each in bought)]
    changed = {key: value for change in steps for key, value in change.keys.items()}
    why = {**wanted.why, **_reasons(found, length), **reasons_of(taken, bought)}
    sections = _sections(wanted, {**base, **loop, **defaults, **changed}, why)
    return Proposal(args, sft, plan, taken, bought, card, sections)


def reasons_of(taken: tuple[Taken, ...], bought: tuple[Bought, ...] = ()) -> dict[str, str]:
    """What each change saves and costs, at the first of its settings."""
    saving = {
        next(iter(step.change.keys)): f"saves {size(step.saved)}: {step.change.cost}"
        for step in taken
    }
    return saving | {next(iter(each.change.keys)): each.why for each in bought}


def _reasons(found: Look, length: int) -> dict[str, str]:
    cut = share(found.cut(length), len(found.lengths)) if found.cut(length) else "none"
    return {
        "max_length": f"longest row: {found.longest:,} tokens; {cut} cut",
        "optim": "moments in 8 bits",
        "values_dtype": "offsets in 16, rounded stochastically",
        "per_device_train_batch_size": "rows at a time",
        "gradient_accumulation_steps": "so many times make a step",
        "save_total_limit": "checkpoints that are kept",
        "use_cpu": "on the CPU",
    }


SECTIONS = (
    ("What is trained on what", ("model_name_or_path", "dataset_name", "max_length")),
    ("", ("density", "num_train_epochs", "learning_rate")),
    ("Output", ("output_dir", "save_total_limit")),
)


def _sections(wanted: Purpose, keys: dict[str, Any], why: dict[str, str]) -> tuple[Section, ...]:
    named = {key for _, names in SECTIONS for key in names}
    memory = {key: value for key, value in keys.items() if key not in named}
    made = [
        Section(title or f"To {wanted.what}", {n: keys[n] for n in names if n in keys}, why)
        for title, names in SECTIONS
    ]
    return (*made[:2], Section("Memory", memory, why), *made[2:])
