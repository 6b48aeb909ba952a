"""`leanlift train --config run.yaml [--any_key value]`.

The options are the fields of `RunArguments` and of TRL's `SFTConfig` under their own names. A
YAML file gives values to any of them, flags override it. `--help` shows those that matter for
most runs; `--help_all` shows every field.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser

from leanlift.errors import UserError, first_line
from leanlift.memory import MemoryPlan, format_report, human
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.fit import fit, parse_card

logger = logging.getLogger("leanlift")

SHOWN = (
    "output_dir",
    "max_length",
    "packing",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "num_train_epochs",
    "max_steps",
    "lr_scheduler_type",
    "warmup_steps",
    "optim",
    "optim_in_backward",
    "max_grad_norm",
    "max_nonfinite_steps",
    "gradient_checkpointing",
    "logging_steps",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "seed",
    "bf16",
    "use_cpu",
)
"""The fields of SFTConfig in `--help`."""


def train_command(argv: Sequence[str]) -> int:
    """Parse, run, and print what came out."""
    card, argv = take_option(list(argv), "--fit")
    args, sft = parse_train(argv)
    cuda = torch.cuda.is_available() and not sft.use_cpu
    if card is None:
        plan = _plan(args, sft, cuda)
    else:
        found = fit(args, sft, parse_card(card), cuda, lambda line: print(line, file=sys.stderr))
        args, sft, plan = found.args, found.sft, found.plan
    if plan is not None:
        say = f"Planned peak: {human(plan.peak)} of tensors, in phase {plan.peak_phase}"
        print(say + (f"; {human(plan.needed)} with the CUDA context." if cuda else "."))
    result = run(args, sft, plan=plan)
    print(format_report(result.memory.to_dict()))
    print(f"\nAdapter: {sft.output_dir}")
    if result.merged is not None:
        print(f"Merged {result.merged.dtype} checkpoint: {result.merged.output}")
    else:
        print(f"Merge it with: leanlift export {sft.output_dir} MERGED_DIR")
    return 0


def _plan(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> MemoryPlan | None:
    """The plan of a run, or None where it cannot be planned: that alone stops no run."""
    try:
        return plan_of(args, sft, cuda)
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("This run could not be planned: %s", first_line(error))
        return None


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not a training argument, and the other arguments.

    Raises:
        UserError: it has no value.
    """
    value, rest = None, []
    pending = iter(argv)
    for argument in pending:
        key, equals, given = argument.partition("=")
        if key == name:
            value = given if equals else next(pending, "")
            if not value:
                raise UserError(f"{name} needs a value.")
        else:
            rest.append(argument)
    return value, rest


def parse_train(argv: list[str]) -> tuple[RunArguments, LiftSFTConfig]:
    """Arguments from a YAML file and flags.

    Raises:
        UserError: unknown keys, wrong types, or settings that exclude each other.
    """
    parser = build_train_parser(show_all="--help_all" in argv)
    if "--help_all" in argv or "--help" in argv or "-h" in argv:
        parser.print_help()
        raise SystemExit(0)
    argv, config_path = _take_config(argv)
    settings = _read_config(config_path, parser) if config_path else {}
    settings = _defaults_of_this_machine(argv, settings) | settings
    for action in parser._actions:
        if action.dest in settings:
            action.required = False
    parser.set_defaults(**settings)
    try:
        args, sft, *_ = parser.parse_args_into_dataclasses(argv)
    except ValueError as error:
        raise UserError(f"these settings do not work: {first_line(error)}") from error
    except ImportError as error:
        raise UserError(
            f"a setting needs a package that is missing: {first_line(error)}"
        ) from error
    return args, sft


def build_train_parser(show_all: bool = False) -> HfArgumentParser:
    """The parser of `leanlift train`."""
    parser = HfArgumentParser(
        (RunArguments, LiftSFTConfig),
        prog="leanlift train",
        usage="leanlift train --config run.yaml [--key value ...]",
        description="Fine-tune the principal weights of a model. Every key may stand in the YAML "
        "file or be given as a flag; flags override the file.",
        epilog="Every other field of TRL's SFTConfig works too; --help_all lists them.",
        formatter_class=_OneName,
        add_help=False,
    )
    parser.add_argument("--fit", help="choose settings for a card of this size, e.g. 8GB")
    parser.add_argument("--config", help="a YAML file with any of these keys")
    parser.add_argument(
        "--help", "-h", action="store_true", help="show the options that matter most"
    )
    parser.add_argument("--help_all", action="store_true", help="show every option there is")
    if not show_all:
        own = {field.name for field in dataclasses.fields(RunArguments)}
        shown = {*own, *SHOWN, "fit", "config", "help", "help_all"}
        for action in parser._actions:
            negative = action.option_strings and action.option_strings[0].startswith("--no")
            if action.dest not in shown or negative:
                action.help = argparse.SUPPRESS
    return parser


class _OneName(argparse.HelpFormatter):
    """One name per option: the dashed spelling and a list of twelve schedulers help nobody."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        name = action.option_strings[0]
        return (
            name if action.nargs == 0 else f"{name} {'VALUES' if action.nargs == '+' else 'VALUE'}"
        )


def _take_config(argv: list[str]) -> tuple[list[str], Path | None]:
    """The arguments without `--config PATH`, and the path."""
    rest, path = [], None
    pending = iter(argv)
    for argument in pending:
        if argument == "--config":
            value = next(pending, None)
            if value is None:
                raise UserError("--config needs the path of a YAML file.")
            path = Path(value)
        elif argument.startswith("--config="):
            path = Path(argument.partition("=")[2])
        else:
            rest.append(argument)
    return rest, path


def _read_config(path: Path, parser: HfArgumentParser) -> dict[str, Any]:
    """A YAML mapping of known keys, values as argparse would have them."""
    if not path.is_file():
        raise UserError(f"the config file {path} does not exist.")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {first_line(error)}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds no mapping: expected lines such as 'learning_rate: 2e-4'.")
    actions = {action.dest: action for action in parser._actions}
    for key, value in settings.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions, n=1)
            hint = f": did you mean {near[0]}?" if near else ": see leanlift train --help_all."
            raise UserError(f"{path} has an unknown key {key!r}{hint}")
        convert = actions[key].type
        if isinstance(value, str) and callable(convert):  # 2e-4 is a string in YAML 1.1
            try:
                settings[key] = convert(value)
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                raise UserError(f"{path}: {key} cannot be {value!r}.") from None
        if actions[key].nargs == "+" and not isinstance(value, list):
            settings[key] = [value]
    return settings


def _defaults_of_this_machine(argv: list[str], settings: dict[str, Any]) -> dict[str, Any]:
    """Without a GPU: train on the CPU, without bf16 autocast unless asked for."""
    asked_for_cpu = settings.get("use_cpu") or "--use_cpu" in argv
    if torch.cuda.is_available() and not asked_for_cpu:
        return {}
    return {"use_cpu": True, "bf16": False}
