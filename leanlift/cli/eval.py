"""`leanlift eval`: a base, a base with an adapter, a merged model on a file of rows; one of them,
or several side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from leanlift.adapters import RUN_NAME, open_adapter
from leanlift.cli.eval_text import eval_text
from leanlift.data.dataset import load_rows
from leanlift.data.functions import function_named
from leanlift.data.ready import formatted
from leanlift.data.tokenizer import end_tokens, load_tokenizer, vocabulary_rows
from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import (
    Measured,
    Sample,
    asked_of,
    check_options,
    measure,
    quiet_loading,
    to_samples,
)
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.tensors import read_json, replacing, write_json
from leanlift.model import freeze_quantized, load_adapter, scale_adapter
from leanlift.rows.judge import are_sentences, judged_words
from leanlift.training import RunArguments
from leanlift.training.base import check_base_place, load_model
from leanlift.training.load import arguments_as_trained
from leanlift.weights.quantized import dtype_of

SHOWN = 3
WORDS = {"nf4+double": "NF4", "nf4": "NF4, single", "fp4+double": "FP4", "fp4": "FP4, single"}
"""Formats of a base in the table; --json has those of an adapter's fingerprint."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what it is called, in what form its weights were, what came out."""

    name: str
    weights: str
    model: str
    adapter: str | None
    base_format: str
    measured: Measured

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary, for `--json`."""
        return {
            "name": self.name,
            "model": self.model,
            "adapter": self.adapter,
            "base_format": self.base_format,
            **self.measured.evaluation.to_dict(),
            "seconds": self.measured.seconds,
        }


def eval_command(options: argparse.Namespace) -> int:
    """Evaluate, print the result, and write it where `--output` says."""
    check_options(options.batch_size, options.max_new_tokens, options.judge)
    _check_predictions(options)
    args = arguments_of(options)
    _check_compared(options, args)
    check_base_place(args)
    if options.merged:
        check_base_place(_merged(options, args))
    rows = _rows_of(options)
    base, revision = args.model_name_or_path, args.model_revision
    tokenizer, how = tokenization_of(base, revision, options)
    samples = to_samples(rows, tokenizer, how)  # before a load that takes minutes
    asked = asked_of(samples, options.max_new_tokens)

    def measured(model: Any, name: str) -> Measured:
        return measure(
            model,
            tokenizer,
            samples,
            asked,
            options.batch_size,
            options.max_new_tokens,
            options.judge,
            progress=True,
            name=name,
        )

    with quiet_loading():
        found = list(_measured_rows(options, args, measured))
    main = next(row for row in found if row.adapter) if options.adapter else found[-1]
    main = main if not options.merged or options.adapter else found[-2]
    shown = [_shown(i, sample, tokenizer, found) for i, sample in enumerate(asked)]
    data = {
        **{key: value for key, value in main.to_dict().items() if key not in ("name", "seconds")},
        "data": options.data,
        "compared": judged_words(asked, options.judge) if asked else None,
        "models": [row.to_dict() for row in found],
    }
    if options.output:
        write_json(Path(options.output), data)
    if options.predictions:
        _write_predictions(Path(options.predictions), shown)
    if options.json:
        print(json.dumps(data, indent=2))
        return 0
    weights = [row.weights for row in found]
    sentences = are_sentences(asked, options.judge)
    print(eval_text(data, weights, shown[:SHOWN], len(shown), sentences))
    return 0


def _rows_of(options: argparse.Namespace) -> Any:
    """The rows that are asked for, as texts where a function makes them."""
    function = options.formatting_func
    if function is not None:
        function = function_named(function, "--formatting_func")
    rows = load_rows(options.data, name="eval")
    if options.limit is not None:
        if options.limit < 1:
            raise UserError(f"expected a limit of at least 1, got {options.limit}.")
        rows = rows.select(range(min(options.limit, len(rows))))
    return rows if function is None else formatted(rows, function, "eval")


def _measured_rows(
    options: argparse.Namespace, args: RunArguments, measured: Callable[[Any, str], Measured]
) -> Sequence[Row]:
    """Load and measure what was asked for, one model at a time; base and adapter share a load."""
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    base, form = args.model_name_or_path, _format(args)
    words = WORDS.get(form, form)
    rows = []
    if options.base_as_stored:
        stored = replace(args, load_in_4bit=False, load_in_8bit=False)
        _say(f"Loading {base}, as it is stored …")
        found = measured(load_model(stored, device), "base as stored")
        rows.append(Row("base as stored", "as stored", base, None, "as stored", found))
    _say(f"Loading {base} …")
    model = load_model(args, device, modules=_modules(options))
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


def _modules(options: argparse.Namespace) -> list[str] | None:
    """The modules that an adapter wants of its base; None: there is no adapter."""
    if not options.adapter:
        return None
    with open_adapter(options.adapter, base=options.model_name_or_path) as adapter:
        return list(adapter.base.shapes)


def _say(line: str) -> None:
    """What is being waited for, to somebody who is there."""
    if sys.stderr.isatty():
        print(line, file=sys.stderr)


def _merged(options: argparse.Namespace, args: RunArguments) -> RunArguments:
    """How to load a merged model: as it is, in the dtype of the others."""
    return RunArguments(options.merged, options.data, load_in_4bit=False, dtype=args.dtype)


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


def _shown(at: int, sample: Sample, tokenizer: Any, rows: Sequence[Row]) -> dict[str, Any]:
    """One asked row as `--predictions` writes it."""
    return {
        "prompt": tokenizer.decode(sample.prompt, skip_special_tokens=True),
        "expected": sample.expected or "",
        **({} if sample.answer is None else {"answer": sample.answer}),
        "answers": {row.name: row.measured.answers[at] for row in rows},
        "right": {row.name: row.measured.right[at] for row in rows},
    }


def _write_predictions(path: Path, shown: Sequence[dict[str, Any]]) -> None:
    with replacing(path) as temporary:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in shown)
        temporary.write_bytes(text.encode("utf-8", "replace"))


def arguments_of(options: argparse.Namespace) -> RunArguments:
    """What is loaded, and how: as asked for, else as the adapter was trained, else as stored.

    Raises:
        UserError: neither a model nor an adapter, contradictory flags, or a damaged adapter.
    """
    if options.load_in_4bit and options.load_in_8bit:
        raise UserError("--load_in_4bit and --load_in_8bit exclude each other: choose one.")
    if options.dtype is not None:
        dtype_of(options.dtype)
    if options.adapter:
        with open_adapter(options.adapter, base=options.model_name_or_path) as adapter:
            args = arguments_as_trained(adapter)
    elif options.model_name_or_path:
        args = RunArguments(options.model_name_or_path, options.data, load_in_4bit=False)
    else:
        raise UserError(
            "there is nothing to evaluate: give --model_name_or_path, --adapter, or both."
        )
    if options.load_in_4bit or options.load_in_8bit:
        args = replace(
            args,
            load_in_4bit=options.load_in_4bit,
            load_in_8bit=options.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
        )
    named = options.model_name_or_path or args.model_name_or_path
    return replace(
        args,
        model_name_or_path=named,
        model_revision=args.model_revision if named == args.model_name_or_path else None,
        dtype=options.dtype or args.dtype,
    )


def tokenization_of(
    base: str, revision: str | None, options: argparse.Namespace
) -> tuple[Any, Tokenization]:
    """An adapter's own tokenizer, chat template and row settings where it has them: those it was
    trained with; else the model's."""
    source, facts = base, {}
    rows = vocabulary_rows(base, revision=revision)
    if options.adapter:
        with open_adapter(options.adapter, base=options.model_name_or_path) as adapter:
            directory = adapter.directory
            rows = rows if adapter.grown is None else adapter.grown.rows
        if (directory / "tokenizer_config.json").is_file():
            source = str(directory)
        if (directory / RUN_NAME).is_file():
            facts = read_json(directory / RUN_NAME, MOST_OF_A_STRANGER)
    tokenizer = load_tokenizer(source, revision=revision if source == base else None)
    how = Tokenization.as_trained(tokenizer, facts, rows, end_tokens(base, revision))
    text_field = "text" if options.formatting_func else options.dataset_text_field
    if text_field:
        how = replace(how, text_field=text_field)
    return tokenizer, how


def _format(args: RunArguments) -> str:
    if args.load_in_4bit:
        return args.bnb_4bit_quant_type + ("+double" if args.bnb_4bit_use_double_quant else "")
    return "int8" if args.load_in_8bit else "as stored"
