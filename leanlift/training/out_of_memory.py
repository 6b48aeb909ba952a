"""What is said when a device had no room: where, what had been planned, what would help."""

from __future__ import annotations

import logging

import torch

from leanlift.errors import UserError, first_line
from leanlift.measure import human
from leanlift.plan import MemoryPlan
from leanlift.training.arguments import LiftSFTConfig, RunArguments, trains_on_gpu
from leanlift.training.changes import changes
from leanlift.training.checkpointing.directory import last_checkpoint
from leanlift.training.fit import fit

logger = logging.getLogger("leanlift")


def out_of_memory(
    phase: str,
    plan: MemoryPlan | None,
    error: BaseException,
    args: RunArguments,
    sft: LiftSFTConfig,
) -> str:
    """Phase, what was asked for, what the plan had said, what would help, what is kept."""
    planned = (
        f"the plan had said {human(plan.phases.get(phase, plan.peak))} for this phase and "
        f"{human(plan.needed)} in all"
        if plan is not None
        else "there was no plan"
    )
    kept = last_checkpoint(sft.output_dir or "leanlift-output")
    return (
        f"out of memory in phase {phase}: {first_line(error).rstrip('.')}; {planned}. "
        f"{what_helps(args, sft)}. {kept[0].upper()}{kept[1:]}."
    )


def what_helps(args: RunArguments, sft: LiftSFTConfig) -> str:
    """The cheapest changes with which the plan fits the card; the first one to try where the plan
    fits already (something else is on the card), or there is no card."""
    cuda = trains_on_gpu(sft)
    card = card_nbytes(cuda)
    if card is not None:
        try:
            found = fit(args, sft, card / 2**30, cuda)
            if found.steps:
                return f"The cheapest change that would fit {human(card)}: {'; '.join(found.steps)}"
        except UserError as error:  # nothing fits: says how much is missing
            return str(error).rstrip(".")
        except Exception as error:  # whatever a model's own code does under fake tensors
            logger.warning("No change could be planned: %s", first_line(error))
    cheapest = next((what for what, _ in changes(args, sft, cuda)), "a shorter max_length")
    return f"The cheapest change that helps: {cheapest}; or let --fit choose"


def card_nbytes(cuda: bool) -> int | None:
    """What the card has; None on a CPU."""
    return torch.cuda.get_device_properties(0).total_memory if cuda else None
