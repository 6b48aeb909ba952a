"""What `leanlift eval` loads, and how: as asked for, else as an adapter was trained."""

from __future__ import annotations

import argparse
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from leanlift.adapters import RUN_NAME, open_adapter
from leanlift.data.tokenizer import end_tokens, load_tokenizer, vocabulary_rows
from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.tensors import read_json
from leanlift.training import RunArguments
from leanlift.training.load import arguments_as_trained
from leanlift.weights.quantized import dtype_of


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
        args = RunArguments(options.model_name_or_path, load_in_4bit=False)
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


def modules_of(options: argparse.Namespace) -> list[str] | None:
    """The modules that an adapter wants of its base; None: there is no adapter."""
    if not options.adapter:
        return None
    with open_adapter(options.adapter, base=options.model_name_or_path) as adapter:
        return list(adapter.base.shapes)


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
    return tokenizer, replace(how, asked=True, text_field=text_field or how.text_field)


def check_same_tokens(merged: str, tokenizer: Any, used: Collection[int]) -> None:
    """Whether ids mean the same to a merged model as to those that it is put beside.

    Args:
        merged: its directory, or a hub name.
        tokenizer: the one that rows are tokenized with.
        used: ids in these rows.

    Raises:
        UserError: it has no embedding for one, or another token.
    """
    advice = "measure it alone, as --model_name_or_path."
    rows, highest = vocabulary_rows(merged), max(used, default=0)
    if rows is not None and highest >= rows:
        raise UserError(
            f"--merged {merged} has {rows} rows in its embedding, and the rows that are measured "
            f"have a token {tokenizer.convert_ids_to_tokens(highest)!r} with the id {highest}: it "
            f"is no merge of this base; {advice}"
        )
    try:
        own = load_tokenizer(merged)
    except UserError:  # it has none of its own
        return
    ids = sorted(used)
    both = (each.convert_ids_to_tokens(ids) for each in (tokenizer, own))
    for token, here, there in zip(ids, *both, strict=True):
        if here != there:
            raise UserError(
                f"--merged {merged} has another tokenizer: the id {token} is {there!r} to it, and "
                f"{here!r} in the rows that are measured, so its losses would mean nothing; "
                f"{advice}"
            )


def format_of(args: RunArguments) -> str:
    """How the Linears of a base are held, as the fingerprint of an adapter calls it."""
    if args.load_in_4bit:
        return args.bnb_4bit_quant_type + ("+double" if args.bnb_4bit_use_double_quant else "")
    return "int8" if args.load_in_8bit else "as stored"
