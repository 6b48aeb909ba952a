"""`leanlift eval`: loss and greedy exact match of a base, a base with an adapter, or a merged
model on a file of rows."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from leanlift.adapter import RUN_NAME, open_adapter
from leanlift.bounded import MOST_OF_A_STRANGER
from leanlift.checkpoint import read_json, write_json
from leanlift.errors import UserError
from leanlift.layer import FrozenLinear, Scratch
from leanlift.model import load_adapter
from leanlift.quantized import dtype_of, frozen_weight, is_quantized
from leanlift.training import RunArguments, load_rows
from leanlift.training.base import check_base_place, load_model
from leanlift.training.evaluate import (
    Evaluation,
    check_options,
    evaluate_samples,
    to_samples,
)
from leanlift.training.load import arguments_as_trained
from leanlift.training.tokenizer import end_tokens, load_tokenizer, vocabulary_rows
from leanlift.training.tokens import Tokenization


def eval_command(options: argparse.Namespace) -> int:
    """Evaluate, print the result, and write it where `--output` says."""
    check_options(options.batch_size, options.max_new_tokens)
    args = arguments_of(options)
    check_base_place(args)
    rows = load_rows(options.data, name="eval")
    if options.limit is not None:
        if options.limit < 1:
            raise UserError(f"expected a limit of at least 1, got {options.limit}.")
        rows = rows.select(range(min(options.limit, len(rows))))
    base, revision = args.model_name_or_path, args.model_revision
    tokenizer, how = tokenization_of(base, revision, options)
    samples = to_samples(rows, tokenizer, how)  # before a load that takes minutes
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    model = load_model(args, device)
    if options.adapter:
        load_adapter(model, options.adapter)
    else:
        _own_forwards(model)
    result = evaluate_samples(
        model,
        tokenizer,
        samples,
        batch_size=options.batch_size,
        max_new_tokens=options.max_new_tokens,
    )
    data = {
        "model": args.model_name_or_path,
        "adapter": options.adapter,
        "data": options.data,
        "base_format": _format(args),
        **result.to_dict(),
    }
    if options.output:
        write_json(Path(options.output), data)
    print(json.dumps(data, indent=2) if options.json else _as_text(data, result))
    return 0


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
        with open_adapter(options.adapter) as adapter:
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
        with open_adapter(options.adapter) as adapter:
            directory = adapter.directory
            rows = rows if adapter.grown is None else adapter.grown.rows
        if (directory / "tokenizer_config.json").is_file():
            source = str(directory)
        if (directory / RUN_NAME).is_file():
            facts = read_json(directory / RUN_NAME, MOST_OF_A_STRANGER)
    tokenizer = load_tokenizer(source, revision=revision if source == base else None)
    how = Tokenization.as_trained(tokenizer, facts, rows, end_tokens(base, revision))
    if options.dataset_text_field:
        how = replace(how, text_field=options.dataset_text_field)
    return tokenizer, how


def _own_forwards(model: nn.Module) -> None:
    """Our forward in every quantized Linear, so that a base and the same base with an adapter
    differ by the adapter alone."""
    scratch = Scratch()
    for name, module in list(model.named_modules()):
        if is_quantized(module):
            model.set_submodule(name, FrozenLinear(module, frozen_weight(module, name), scratch))


def _format(args: RunArguments) -> str:
    if args.load_in_4bit:
        return args.bnb_4bit_quant_type + ("+double" if args.bnb_4bit_use_double_quant else "")
    return "int8" if args.load_in_8bit else "as stored"


def _as_text(data: dict[str, Any], result: Evaluation) -> str:
    adapter = f" with {data['adapter']}" if data["adapter"] else ""
    lines = [f"{data['model']} ({data['base_format']}){adapter} on {data['data']}"]
    if result.loss is not None:
        lines.append(
            f"loss {result.loss:.4f}, perplexity {result.perplexity:.4g} over {result.tokens:,} "
            f"tokens of {result.rows:,} rows"
        )
    if result.exact_match is not None:
        lines.append(
            f"exact match {result.exact_match:.2%} of {result.generated:,}, judged by "
            f"{result.judged_by}"
        )
    return "\n".join(lines)
