"""The parsers of `leanlift eval`, `info` and `report`: what an adapter, a model or a run is like.

Nothing heavy is imported here, and by `report` and `info` nothing heavy at all.
"""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import Any

from leanlift.cli.eval_data import read_data
from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json
from leanlift.io.places import RUN_NAME, base_directory, check_adapter_place
from leanlift.rows.first import check_first_rows
from leanlift.rows.judge import JUDGES, check_judge
from leanlift.rows.source import check_place


def add_measure(commands: Any) -> None:
    """The parsers of the three commands."""
    _add_eval(commands)
    info = commands.add_parser("info", help="what an adapter holds")
    info.add_argument(
        "adapter", type=expanduser, help="an adapter: a run's output_dir, a checkpoint, a hub name"
    )
    info.add_argument("--json", action="store_true", help="print JSON, every module included")
    info.set_defaults(run=_info)

    report = commands.add_parser(
        "report",
        help="what became of a run: losses, memory, trained entries; or of several, side by side",
        description="Show what a run has left, as text or as one page that needs no network. "
        "Several runs are compared: settings that differ, losses, peaks, times.",
    )
    report.add_argument(
        "runs", type=expanduser, nargs="+", metavar="RUN", help="output_dir of a training run"
    )
    report.add_argument(
        "--html",
        type=expanduser,
        nargs="?",
        const="",
        metavar="FILE",
        help="write a page with curves and maps; default: report.html in the run's directory",
    )
    report.add_argument(
        "--json", action="store_true", help="print JSON: memory.json, or the comparison"
    )
    report.set_defaults(run=_report)


def _add_eval(commands: Any) -> None:
    parser = commands.add_parser(
        "eval",
        help="loss and greedy answers on files of rows or texts: base, adapter and merged side by "
        "side",
        description="Measure a base, a base with an adapter, or a merged model on the rows that "
        "training takes, or on plain text; or several of them in one table (--base, "
        "--base_as_stored, --merged), on several datasets (--data target=a.jsonl --data "
        "prose=b.txt) with how far each is from the base. "
        "Greedy answers are compared with the 'answer' column where there is one, else with the "
        "completion; --judge says how.",
    )
    _add_measured(parser.add_argument_group("what is measured"))
    _add_rows(parser)
    _add_output(parser.add_argument_group("output"))
    parser.set_defaults(run=_eval)


def _add_measured(model: Any) -> None:
    model.add_argument(
        "--model_name_or_path",
        type=expanduser,
        help="the base or a merged model; default: the base that the adapter was trained on",
    )
    model.add_argument("--adapter", type=expanduser, help="directory of an adapter, or a hub name")
    model.add_argument(
        "--base",
        action="store_true",
        help="also the base without the adapter, quantized as for training; loaded once for both",
    )
    model.add_argument(
        "--base_as_stored", action="store_true", help="also the base as it is on disk: 16 bits"
    )
    model.add_argument("--merged", type=expanduser, help="also a merged model of this directory")
    add_held(model)


def add_held(model: Any) -> None:
    """How a base is held."""
    model.add_argument(
        "--load_in_4bit",
        action="store_true",
        help="hold the base in NF4 with double quantization; default: as the adapter was trained, "
        "else as stored",
    )
    model.add_argument("--load_in_8bit", action="store_true", help="hold the base in INT8")
    model.add_argument(
        "--dtype", help="of everything not quantized; default: the adapter's, else as in train"
    )


def _add_rows(parser: Any) -> None:
    rows = parser.add_argument_group("on which rows")
    rows.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]FILE",
        help=".json, .jsonl, .csv, .tsv or .parquet, a text (.txt, .md), or a hub name; given "
        "several times, all in one table, each by its NAME or the file's own",
    )
    rows.add_argument(
        "--max_length",
        type=int,
        help="most tokens of a window in which a text is read (1024, or the base's positions); "
        "rows are never cut",
    )
    rows.add_argument(
        "--dataset_text_field",
        help="the column of plain texts; default: as the adapter was trained, else text",
    )
    rows.add_argument(
        "--formatting_func", help="module:function that makes a text of a row, as it was trained"
    )
    rows.add_argument("--limit", type=int, help="the first so many rows alone")
    rows.add_argument(
        "--batch_size", type=int, default=8, help="rows at a time, at most (8); of long texts fewer"
    )
    answers = parser.add_argument_group("greedy answers")
    answers.add_argument(
        "--max_new_tokens", type=int, default=256, help="of an answer (256); 0: loss alone"
    )
    answers.add_argument(
        "--judge",
        default="auto",
        help="compare the last number, the last letter A to E, the last label such as true or "
        "option2, the whole text, or whether the text contains what is expected; auto (the "
        f"default): by what is expected. One of: {', '.join(JUDGES)}",
    )


def _add_output(output: Any) -> None:
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument(
        "--output", type=expanduser, metavar="FILE", help="also write the JSON to a file"
    )
    output.add_argument(
        "--predictions",
        type=expanduser,
        metavar="FILE",
        help="write prompt, expected and given answers as JSON lines; as predictions.jsonl in a "
        "run's directory they are shown by leanlift report --html",
    )


def _eval(options: argparse.Namespace) -> int:
    if options.adapter is not None:
        check_adapter_place(options.adapter)
    if options.model_name_or_path is not None:
        base_directory(options.model_name_or_path)
    elif options.adapter is None and options.merged is not None:
        raise UserError(
            "--merged is measured beside others: give --model_name_or_path or --adapter too, or "
            f"measure it alone with --model_name_or_path {options.merged}."
        )
    elif options.adapter is None:
        raise UserError(
            "there is nothing to evaluate: give --model_name_or_path, --adapter, or both."
        )
    for name, least in (("limit", 1), ("batch_size", 1), ("max_new_tokens", 0), ("max_length", 2)):
        given = getattr(options, name)
        if given is not None and given < least:
            raise UserError(f"expected a {name} of at least {least}, got {given}.")
    check_judge(options.judge)
    for name in ("output", "predictions"):
        parent = Path(getattr(options, name) or "x").parent
        if not parent.is_dir():
            raise UserError(f"--{name} needs a directory that exists, and {parent} does not.")
    options.data = read_data(options.data)
    text_field = options.dataset_text_field or _text_field(options.adapter)
    for data in options.data:
        check_place(data.path)
        if text_field is not None and options.formatting_func is None:
            check_first_rows(data.path, data.where(len(options.data) > 1), text_field)
    from leanlift.cli.eval import eval_command

    return eval_command(options)


def _text_field(adapter: str | None) -> str | None:
    """The column of plain texts that an adapter was trained on, by what its run has noted; None
    for one on the hub: nobody knows yet."""
    if adapter is None:
        return "text"
    directory = Path(adapter)
    if not directory.is_dir():
        return None
    run = directory / RUN_NAME
    noted = read_json(run, MOST_OF_A_STRANGER) if run.is_file() else {}
    return str(noted.get("dataset_text_field") or "text") if isinstance(noted, dict) else "text"


def _info(options: argparse.Namespace) -> int:
    check_adapter_place(options.adapter)
    from leanlift.cli.info import info_command

    return info_command(options.adapter, options.json)


def _report(options: argparse.Namespace) -> int:
    from leanlift.cli.report import report_command

    return report_command(options)
