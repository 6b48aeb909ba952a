"""The options of the paper preset, and what they start."""

from __future__ import annotations

import argparse
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.paper.given import Given
from benchmarks.quality.paper.run import paper
from benchmarks.quality.paper.suites import BASES, SUITES, Suite
from leanlift.errors import Interrupted, UserError


def add_arguments(own: Any) -> None:
    """Add the options to a parser, or a group of one, beside `--model` and `--data`."""
    names = list(dict.fromkeys(name for suite in SUITES.values() for name in suite.methods))
    own.add_argument("--suite", choices=sorted(SUITES), default="math")
    own.add_argument("--tests", type=Path, help="directory of the test sets, <name>.json")
    own.add_argument("--text", type=Path, help="what forgetting is measured on")
    own.add_argument("--output", type=Path, default=Path("runs/paper"), help="runs and results")
    own.add_argument("--methods", nargs="+", choices=names, default=[])
    own.add_argument("--settings_of", choices=sorted(BASES.values()), help="a base of the paper")
    own.add_argument("--lr", type=float, help="instead of the suite's learning rate")
    own.add_argument("--rows_at_once", type=int, help="of a step, on the card; the paper's suites")
    own.add_argument("--limit", type=int, help="rows of each test set, at most")
    own.add_argument("--tflops", type=float, help="peak of the card, dense bf16")
    own.add_argument("--cost", action="store_true", help="only say what it takes")


def from_arguments(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Run what was asked for; input that cannot be used ends in one sentence and exit code 2."""
    absent = [f"--{name}" for name in ("model", "data", "tests") if getattr(args, name) is None]
    if absent:
        parser.error(f"the paper preset needs {', '.join(absent)}")
    suite = SUITES[args.suite]
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
    try:
        given = Given(
            model=args.model,
            data=args.data,
            tests=args.tests,
            output=args.output,
            text=args.text,
            methods=tuple(args.methods),
            base=args.settings_of,
            loop=_loop(args, suite),
            limit=args.limit,
            tflops=args.tflops,
        )
        paper(suite, given, say=partial(print, flush=True), cost_alone=args.cost)
    except UserError as error:
        parser.exit(2, f"error: {error}\n")
    except Interrupted as stopped:  # what is kept; the same command goes on with it
        parser.exit(stopped.exit_code, f"{stopped}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped: the same command goes on from the last checkpoint.\n")


def _loop(args: argparse.Namespace, suite: Suite) -> dict[str, Any]:
    """Fields of LiftSFTConfig that were asked for.

    Raises:
        UserError: rows at a time that do not make a batch.
    """
    found = {} if args.lr is None else {"learning_rate": args.lr}
    if args.rows_at_once is not None:
        if args.rows_at_once < 1 or suite.batch % args.rows_at_once:
            raise UserError(
                f"expected --rows_at_once to divide the batch of {suite.batch} rows, got "
                f"{args.rows_at_once}."
            )
        found["per_device_train_batch_size"] = args.rows_at_once
        found["gradient_accumulation_steps"] = suite.batch // args.rows_at_once
    return found
