"""`leanlift plan --model_name_or_path M [--any_key value] [--fit 8GB] [--json] [--plot FILE]`.

Takes every key that `leanlift train` takes; those without a bearing on memory change nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from leanlift.cli.settings import asks_for_cpu, parse_train, take_option
from leanlift.memory import format_plan
from leanlift.memory.picture import draw
from leanlift.training import plan_of
from leanlift.training.fit import fit, parse_card

USAGE = """usage: leanlift plan --model_name_or_path M [--key value ...]
                     [--fit 8GB] [--cpu] [--json] [--plot FILE]

What fine-tuning M will need, from its config.json alone: a hub name, a directory, or the file.
Takes the keys of 'leanlift train' (see its --help), for example
  --max_length 2048 --per_device_train_batch_size 1 --density 0.05 --optim sparse_adamw_8bit

  --fit 8GB     choose settings with which a card of this size will do, and say why
  --cpu         plan for a run on the CPU
  --json        print JSON
  --plot FILE   also draw the bytes as a stacked bar (needs matplotlib)
"""


def plan_command(argv: Sequence[str]) -> int:
    """Plan, and print what came out."""
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE)
        return 0
    rest = [argument for argument in argv if argument not in ("--json", "--cpu")]
    card, rest = take_option(rest, "--fit")
    picture, rest = take_option(rest, "--plot")
    if not any(a.startswith(("--dataset_name", "--config")) for a in rest):
        rest += ["--dataset_name", "rows.json"]
    args, sft = parse_train(rest)
    cuda = "--cpu" not in argv and not asks_for_cpu(rest)
    chosen: tuple[str, ...] = ()
    if card is not None:
        found = fit(args, sft, parse_card(card), cuda, _say)
        plan, chosen = found.plan, found.steps
    else:
        plan = plan_of(args, sft, cuda)
    if "--json" in argv:
        print(json.dumps({**plan.to_dict(), "changed": list(chosen)}, indent=2))
    else:
        print(format_plan(plan.to_dict()))
        for line in chosen:
            print(f"changed: {line}")
    if picture is not None:
        draw({"plan": plan.categories}, picture, "x")
        _say(f"Wrote {picture}")
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr)
