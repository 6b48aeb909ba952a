"""`leanlift train --config run.yaml [--any_key value]`; see `leanlift.cli.settings`.

`--help` shows the options that matter for most runs; `--help_all` shows every field.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from functools import partial

from leanlift.cli.parsing import take_switch, without
from leanlift.cli.plan import card_for_times
from leanlift.cli.settings import parse_train, read_command
from leanlift.cli.trying import Trying
from leanlift.errors import MaskError, first_line
from leanlift.plan import MemoryPlan
from leanlift.processes import is_first, part
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.arguments import trains_on_gpu
from leanlift.training.batches import Batches
from leanlift.training.checks import check_settings
from leanlift.training.dry_run import dry_run
from leanlift.training.fit import fit, parse_card
from leanlift.training.out_of_memory import card_nbytes
from leanlift.training.screens import Screen, screen_of
from leanlift.training.screens.words import shell

__all__ = ["parse_train", "resuming", "train_command"]

logger = logging.getLogger("leanlift")


def train_command(argv: Sequence[str]) -> int:
    """Parse and run; the run shows itself."""
    asked = read_command("train", argv)
    args, sft = asked.args, asked.sft
    cuda = trains_on_gpu(sft)
    screen = screen_of(args.log_format)
    if not is_first():  # one of several processes speaks for all
        logger.setLevel(logging.ERROR)
    if asked.own.fit is not None:
        check_settings(sft, args.lift_config())
        gib = parse_card(asked.own.fit)
        card = card_for_times(gib, cuda)
        with Trying() as trying:
            found = fit(args, sft, gib, cuda, trying, card=card, asked=asked.given)
        args, sft = found.args, found.sft
    if not is_first():
        if not asked.own.dry_run:
            run(args, sft)
            part()
        return 0
    plan = partial(_plan, args, sft, cuda)
    if asked.own.dry_run:
        command = shell("leanlift", "train", *take_switch(argv, "--dry_run")[1])
        _look(args, sft, plan, screen, command)
    else:
        run(args, sft, plan=plan, screen=screen, command=resuming(argv))
        part()
    return 0


def _look(
    args: RunArguments,
    sft: LiftSFTConfig,
    plan: Callable[[Batches], MemoryPlan | None],
    screen: Screen,
    command: str,
) -> None:
    """A dry run, and the command of the real one."""
    room = card_nbytes(trains_on_gpu(sft))
    lines = dry_run(args, sft, plan, screen, room)
    if args.log_format == "json":
        print(json.dumps({"event": "ready", "lines": lines, "command": command}))
    else:
        print("\n".join([*lines, "", f"Ready: {command}"]))


def resuming(argv: Sequence[str]) -> str:
    """The command that goes on with a run that was started with these arguments."""
    key = "resume_from_checkpoint"
    return shell("leanlift", "train", *without(argv, key), f"--{key}", "true")


def _plan(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool, batches: Batches
) -> MemoryPlan | None:
    """The plan of a run, or None where it cannot be planned: that alone stops no run.

    Raises:
        UserError: what is to be trained is not there; loading the base would not change that.
    """
    try:
        return plan_of(args, sft, cuda, batches)
    except MaskError:
        raise
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("This run could not be planned: %s", first_line(error))
        return None
