"""`leanlift train --config run.yaml [--any_key value]`; see `leanlift.cli.settings`.

`--help` shows the options that matter for most runs; `--help_all` shows every field.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial

import torch

from leanlift.cli.settings import build_train_parser, parse_train, take_option
from leanlift.errors import MaskError, first_line
from leanlift.memory import MemoryPlan
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.checks import check_settings
from leanlift.training.fit import fit, parse_card
from leanlift.training.screens import screen_of
from leanlift.training.screens.words import shell

__all__ = ["build_train_parser", "parse_train", "resuming", "train_command"]

logger = logging.getLogger("leanlift")


def train_command(argv: Sequence[str]) -> int:
    """Parse and run; the run shows itself."""
    command = resuming(argv)
    card, argv = take_option(list(argv), "--fit")
    args, sft = parse_train(argv)
    cuda = torch.cuda.is_available() and not sft.use_cpu
    planned: Callable[[], MemoryPlan | None] = partial(_plan, args, sft, cuda)
    screen = screen_of(args.log_format)
    if card is not None:
        check_settings(sft, args.lift_config())
        found = fit(args, sft, parse_card(card), cuda, lambda line: print(line, file=sys.stderr))
        args, sft, planned = found.args, found.sft, partial(_known, found.plan)
    run(args, sft, plan=planned, screen=screen, command=command)
    return 0


def _known(plan: MemoryPlan) -> MemoryPlan:
    return plan


def resuming(argv: Sequence[str]) -> str:
    """The command that goes on with a run that was started with these arguments."""
    key = "resume_from_checkpoint"
    names = (f"--{key}", f"--{key.replace('_', '-')}")
    kept: list[str] = []
    pending = iter(argv)
    for argument in pending:
        if argument in names:
            next(pending, None)
        elif not argument.startswith(tuple(f"{name}=" for name in names)):
            kept.append(argument)
    return shell("leanlift", "train", *kept, f"--{key}", "true")


def _plan(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> MemoryPlan | None:
    """The plan of a run, or None where it cannot be planned: that alone stops no run.

    Raises:
        UserError: what is to be trained is not there; loading the base would not change that.
    """
    try:
        return plan_of(args, sft, cuda)
    except MaskError:
        raise
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("This run could not be planned: %s", first_line(error))
        return None
