"""`leanlift train --config run.yaml [--any_key value]`; see `leanlift.cli.settings`.

`--help` shows the options that matter for most runs; `--help_all` shows every field.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from functools import partial

import torch

from leanlift.cli.settings import build_train_parser, parse_train, take_option
from leanlift.errors import MaskError, first_line
from leanlift.memory import MemoryPlan, format_report, human
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.batches import Batches
from leanlift.training.checks import check_settings
from leanlift.training.fit import fit, parse_card

__all__ = ["build_train_parser", "parse_train", "train_command"]

logger = logging.getLogger("leanlift")


def train_command(argv: Sequence[str]) -> int:
    """Parse, run, and print what came out."""
    card, argv = take_option(list(argv), "--fit")
    args, sft = parse_train(argv)
    cuda = torch.cuda.is_available() and not sft.use_cpu
    if card is not None:
        check_settings(sft, args.lift_config())
        found = fit(args, sft, parse_card(card), cuda, lambda line: print(line, file=sys.stderr))
        args, sft = found.args, found.sft
    result = run(args, sft, plan=partial(_plan, args, sft, cuda))
    print(format_report(result.memory.to_dict()))
    print(f"\nAdapter: {sft.output_dir}")
    if result.merged is not None:
        print(f"Merged {result.merged.dtype} checkpoint: {result.merged.output}")
    else:
        print(f"Merge it with: leanlift export {sft.output_dir} MERGED_DIR")
    return 0


def _plan(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool, batches: Batches
) -> MemoryPlan | None:
    """The plan of a run, or None where it cannot be planned: that alone stops no run.

    Raises:
        UserError: what is to be trained is not there; loading the base would not change that.
    """
    try:
        return _say(plan_of(args, sft, cuda, batches), cuda)
    except MaskError:
        raise
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("This run could not be planned: %s", first_line(error))
        return None


def _say(plan: MemoryPlan, cuda: bool) -> MemoryPlan:
    say = f"Planned peak: {human(plan.peak)} of tensors, in phase {plan.peak_phase}"
    print(say + (f"; {human(plan.needed)} with the CUDA context." if cuda else "."))
    return plan
