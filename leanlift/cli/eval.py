"""`leanlift eval`: a base, a base with an adapter, a merged model on files of rows or texts; one of
them, or several side by side. Each model is loaded once, whatever the number of files."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanlift.adapters import open_adapter
from leanlift.cli.eval_base import (
    arguments_of,
    check_same_tokens,
    format_of,
    modules_of,
    tokenization_of,
)
from leanlift.cli.eval_rows import Dataset, datasets_of, tokens_in
from leanlift.cli.eval_several import compared_with, datasets_data, several_text
from leanlift.cli.eval_text import eval_text
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import (
    Measured,
    check_options,
    measure,
    quiet_loading,
)
from leanlift.io.tensors import replacing, write_json
from leanlift.model import freeze_quantized, load_adapter, scale_adapter
from leanlift.rows.judge import are_sentences, judged_words
from leanlift.training import RunArguments
from leanlift.training.base import check_base_place, load_model

SHOWN = 3
WORDS = {"nf4+double": "NF4", "nf4": "NF4, single", "fp4+double": "FP4", "fp4": "FP4, single"}
"""Formats of a base in the table; --json has those of an adapter's fingerprint."""


@dataclass(frozen=True)
class Row:
    """One model: what it is called, how its weights were held, what came out on each dataset."""

    name: str
    weights: str
    model: str
    adapter: str | None
    base_format: str
    measured: Sequence[Measured]

    @property
    def about(self) -> dict[str, Any]:
        """What it is, JSON-ready."""
        return {"model": self.model, "adapter": self.adapter, "base_format": self.base_format}

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary of it on one dataset, for `--json`."""
        (measured,) = self.measured
        evaluation = measured.evaluation.to_dict()
        return {"name": self.name, **self.about, **evaluation, "seconds": measured.seconds}


def eval_command(options: argparse.Namespace) -> int:
    """Evaluate, print the result, and write it where `--output` says."""
    check_options(options.batch_size, options.max_new_tokens, options.judge)
    _check_predictions(options)
    args = arguments_of(options)
    _check_compared(options, args)
    check_base_place(args)
    if options.merged:
        check_base_place(_merged(options, args))
    base, revision = args.model_name_or_path, args.model_revision
    tokenizer, how = tokenization_of(base, revision, options)
    # before a load that takes minutes
    datasets = datasets_of(options, tokenizer, how, base, revision)
    if options.merged:
        check_same_tokens(options.merged, tokenizer, tokens_in(datasets))

    def measured(model: Any, name: str) -> list[Measured]:
        return [_measure(options, model, tokenizer, name, each, len(datasets)) for each in datasets]

    with quiet_loading():
        found = list(_measured_rows(options, args, measured))
    shown = [_shown(found, at, dataset, tokenizer) for at, dataset in enumerate(datasets)]
    data = _data(options, found, datasets)
    if options.output:
        write_json(Path(options.output), data)
    if options.predictions:
        _write_predictions(Path(options.predictions), [row for rows in shown for row in rows])
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    weights = [row.weights for row in found]
    sentences = any(are_sentences(dataset.asked, options.judge) for dataset in datasets)
    if len(datasets) == 1:
        print(eval_text(data, weights, shown[0][:SHOWN], len(shown[0]), sentences))
    else:
        print(several_text(data, weights, [row[0] for row in shown if row][:SHOWN], sentences))
    return 0


def _measure(
    options: argparse.Namespace,
    model: Any,
    tokenizer: Any,
    name: str,
    dataset: Dataset,
    of: int,
) -> Measured:
    """A model on one dataset of so many."""
    called = "" if of == 1 else dataset.data.name
    return measure(
        model,
        tokenizer,
        dataset.samples,
        dataset.asked,
        options.batch_size,
        options.max_new_tokens,
        options.judge,
        progress=True,
        name=f"{name}, {called}" if called else name,
        data=called,
    )


def _data(
    options: argparse.Namespace, found: Sequence[Row], datasets: Sequence[Dataset]
) -> dict[str, Any]:
    """What `--json` prints: of one dataset as it always was, of several a list of them."""
    main = next(row for row in found if row.adapter) if options.adapter else found[-1]
    main = main if not options.merged or options.adapter else found[-2]

    def judged(dataset: Dataset) -> str | None:
        return judged_words(dataset.asked, options.judge) if dataset.asked else None

    if len(datasets) == 1:
        return {
            **{k: value for k, value in main.to_dict().items() if k not in ("name", "seconds")},
            "data": datasets[0].data.path,
            "is_text": datasets[0].is_text,
            "compared": judged(datasets[0]),
            "models": [row.to_dict() for row in found],
        }
    return {
        **main.about,
        "compared_with": compared_with([row.name for row in found]),
        "models": [
            {"name": row.name, **row.about, "seconds": sum(m.seconds for m in row.measured)}
            for row in found
        ],
        "datasets": datasets_data(datasets, [(row.name, row.measured) for row in found], judged),
    }


def _measured_rows(
    options: argparse.Namespace, args: RunArguments, measured: Callable[[Any, str], list[Measured]]
) -> Sequence[Row]:
    """Load and measure what was asked for, one model at a time; base and adapter share a load."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    base, form = args.model_name_or_path, format_of(args)
    words = WORDS.get(form, form)
    rows = []
    if options.base_as_stored:
        stored = replace(args, load_in_4bit=False, load_in_8bit=False)
        _say(f"Loading {base}, as it is stored …")
        found = measured(load_model(stored, device), "base as stored")
        rows.append(Row("base as stored", "as stored", base, None, "as stored", found))
    _say(f"Loading {base} …")
    model = load_model(args, device, modules=modules_of(options))
    if options.adapter:
        load_adapter(model, options.adapter)
        if options.base:
            found = measured(scale_adapter(model, 0.0), "base")
            rows.append(Row("base", words, base, None, form, found))
        found = measured(scale_adapter(model, 1.0), "base + adapter")
        trained = f"{words} + offsets"
        rows.append(Row("base + adapter", trained, base, options.adapter, form, found))
    else:
        freeze_quantized(model)
        rows.append(Row("model", words, base, None, form, measured(model, "model")))
    if options.merged:
        del model
        _say(f"Loading {options.merged} …")
        merged = load_model(_merged(options, args), device)
        found = measured(merged, "merged")
        rows.append(Row("merged", "as stored", options.merged, None, "as stored", found))
    return rows


def _say(line: str) -> None:
    """What is being waited for, to somebody who is there."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _merged(options: argparse.Namespace, args: RunArguments) -> RunArguments:
    """How to load a merged model: as it is, in the dtype of the others."""
    return RunArguments(options.merged, load_in_4bit=False, dtype=args.dtype)


def _check_compared(options: argparse.Namespace, args: RunArguments) -> None:
    """Refuse comparisons of a thing with itself."""
    if options.base and not options.adapter:
        raise UserError(
            "--base is the base without its adapter: give --adapter too, or name a base alone with "
            "--model_name_or_path."
        )
    if options.base_as_stored and not (args.load_in_4bit or args.load_in_8bit):
        raise UserError(
            "--base_as_stored is for a base that is quantized when it is loaded, and this one is "
            "not: --base (with an adapter) measures it as it is stored."
        )
    if options.base_as_stored and options.adapter:
        with open_adapter(options.adapter, base=options.model_name_or_path) as adapter:
            if adapter.grown is not None:
                raise UserError(
                    f"{options.adapter} was trained with {adapter.grown.rows} rows in the "
                    "embedding, more than its base has on disk, so --base_as_stored could not read "
                    "these rows' tokens: take --base instead."
                )


def _check_predictions(options: argparse.Namespace) -> None:
    if not options.predictions:
        return
    if not options.max_new_tokens:
        raise UserError("--predictions wants answers: give a --max_new_tokens above 0.")
    path = Path(options.predictions)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--predictions {path}: expected a file in a directory that exists.")


def _shown(
    rows: Sequence[Row], number: int, dataset: Dataset, tokenizer: Any
) -> list[dict[str, Any]]:
    """The asked rows of a dataset as `--predictions` writes them."""
    several = len(rows[0].measured) > 1
    return [
        {
            **({"dataset": dataset.data.name} if several else {}),
            "prompt": tokenizer.decode(sample.prompt, skip_special_tokens=True),
            "expected": sample.expected or "",
            **({} if sample.answer is None else {"answer": sample.answer}),
            "answers": {row.name: row.measured[number].answers[at] for row in rows},
            "right": {row.name: row.measured[number].right[at] for row in rows},
        }
        for at, sample in enumerate(dataset.asked)
    ]


def _write_predictions(path: Path, shown: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
        temporary.write_bytes(text.encode("utf-8", "replace"))
