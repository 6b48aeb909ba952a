"""The tokenizer and the special tokens of a merged checkpoint.

Tokenizer files come from one source: all of the adapter's where it has a tokenizer, being what was
trained with, else all of the base's. A file of the other beside them would win over them in some
reader: transformers 4 wrote `special_tokens_map.json` and `added_tokens.json`, transformers 5
writes neither and reads both. What says how the files are read is the base's: its tokenizer class
(transformers 5 saves one that transformers 4 does not have) and code.

config.json gets the end token that was trained, generation_config.json that and what the base
stopped at.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leanlift.adapters.special import SpecialTokens, as_ids, union
from leanlift.errors import UserError
from leanlift.export.processors import FILES, write_processor
from leanlift.io.hub import inside
from leanlift.io.tensors import read_json, write_json

CONFIG = "tokenizer_config.json"
WHOLE = "tokenizer.json"
VOCABULARY = ("tokenizer.model", "vocab.json", "vocab.txt", "merges.txt")
TEMPLATES = ("chat_template.jinja", "chat_template.json")
TOKENIZER_FILES = (
    WHOLE,
    CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    *VOCABULARY,
    *TEMPLATES,
)
FALLBACK_CLASS = "PreTrainedTokenizerFast"
GENERATION = "generation_config.json"
LARGEST = 128 * 2**20
"""Bytes of a tokenizer file; those of vocabularies of 262,144 have 35 MB."""


def write_tokenizer(base: Path, adapter: Path, output: Path, rows: int | None) -> None:
    """Write the tokenizer files of a merge, and its processor's.

    Args:
        base: the base checkpoint, whose small files are in `output` already.
        adapter: the adapter's directory.
        output: where the merge is.
        rows: of the embedding; None: not known.

    Raises:
        UserError: a tokenizer that is larger than the embedding, damaged, or a link to elsewhere.
    """
    write_processor(base, adapter, output)
    own = [name for name in TOKENIZER_FILES if (adapter / name).is_file()]
    if not has_tokenizer(adapter):
        copy_files(adapter, output, [name for name in own if name in TEMPLATES])
        return
    same_vocabulary = _model(base / WHOLE) is not None and _model(base / WHOLE) == _model(
        adapter / WHOLE
    )
    for name in TOKENIZER_FILES:
        if not (name in VOCABULARY and same_vocabulary):  # which says the same, for other readers
            (output / name).unlink(missing_ok=True)
    copy_files(adapter, output, own)
    _check_size(base, adapter, rows)
    _write_config(base / CONFIG, output / CONFIG)


def has_tokenizer(directory: Path) -> bool:
    """Whether there is a tokenizer, not a template alone."""
    return any((directory / name).is_file() for name in (WHOLE, *VOCABULARY))


def copy_files(source: Path, output: Path, names: list[str]) -> None:
    """Copy files of an adapter.

    Raises:
        UserError: one is a link to somewhere else on this machine, or too large.
    """
    for name in names:
        target = inside(source, source / name)
        if target is None:
            raise UserError(
                f"{source / name} is a link to {(source / name).resolve()}, outside of its "
                "directory: remove it."
            )
        if target.stat().st_size > LARGEST:
            raise UserError(
                f"{source / name} has {target.stat().st_size:,} bytes, and no tokenizer has files "
                f"of more than {LARGEST:,}: remove it."
            )
        shutil.copyfile(target, output / name)


def copy_tokenizer(source: Path, output: Path) -> None:
    """Copy what there is of an adapter's tokenizer, its chat template and its processor.

    Raises:
        UserError: a file is a link to somewhere else on this machine.
    """
    files = (*TOKENIZER_FILES, *FILES)
    copy_files(source, output, [name for name in files if (source / name).is_file()])


def trained_tokens(adapter: Path, recorded: SpecialTokens) -> SpecialTokens:
    """The special tokens that an adapter was trained with.

    Its tokenizer's files count before what its configuration has recorded: with them the texts
    were made that it was trained on.
    """
    found = dict(_ids_of_tokenizer(adapter))
    eos, bos, pad = (found.get(name) for name in ("eos_token", "bos_token", "pad_token"))
    return SpecialTokens(
        recorded.eos if eos is None or eos in recorded.eos[:1] else (eos,),
        recorded.bos if bos is None else bos,
        recorded.pad if pad is None else pad,
        union(() if eos is None else (eos,), recorded.stops),
    )


def put_tokens(tokens: SpecialTokens, config: dict[str, Any], output: Path) -> None:
    """Let config.json (as data, edited here) and generation_config.json (in `output`) say which
    tokens end, begin and pad a text."""
    before = as_ids(config.get("eos_token_id"))
    nested = config.get("text_config")
    texts = [nested] if isinstance(nested, dict) and "eos_token_id" in nested else []
    for holder in (config, *texts):
        before = union(before, as_ids(holder.get("eos_token_id")))
        if tokens.eos:
            holder["eos_token_id"] = _one_or_more(tokens.eos)
        for name, value in (("bos_token_id", tokens.bos), ("pad_token_id", tokens.pad)):
            if value is not None:
                holder[name] = value
    path = output / GENERATION
    generation = read_json(path) if path.is_file() else {}
    if not isinstance(generation, dict):
        raise UserError(f"{GENERATION} of the base is damaged: expected a JSON object.")
    ends = union(tokens.eos, tokens.stops, as_ids(generation.get("eos_token_id")) or before)
    if not ends or (not path.is_file() and ends == tokens.eos):
        return
    generation["eos_token_id"] = _one_or_more(ends)
    for name, value in (("bos_token_id", tokens.bos), ("pad_token_id", tokens.pad)):
        if value is not None:
            generation[name] = value
    write_json(path, generation)


def _one_or_more(ids: tuple[int, ...]) -> int | list[int]:
    return ids[0] if len(ids) == 1 else list(ids)


def _write_config(base: Path, merged: Path) -> None:
    """The adapter's tokenizer_config.json, read as the base's is."""
    if not merged.is_file():
        return
    config, of_base = _object(merged), _object(base)
    for key in ("tokenizer_class", "auto_map"):
        config.pop(key, None)
        if key in of_base:
            config[key] = of_base[key]
    if "tokenizer_class" not in config:
        config["tokenizer_class"] = FALLBACK_CLASS
    if isinstance(config.get("extra_special_tokens"), list):  # a mapping in transformers 4
        more = config.pop("extra_special_tokens")
        config.setdefault("additional_special_tokens", more)
    for key in ("is_local", "local_files_only"):  # of the machine that saved it
        config.pop(key, None)
    write_json(merged, config)


def _check_size(base: Path, adapter: Path, rows: int | None) -> None:
    """Refuse ids that the embedding has no row for; those that the base's own tokenizer has
    without one are its own affair."""
    largest = _largest_id(adapter / WHOLE)
    if rows is not None and largest >= rows and largest > _largest_id(base / WHOLE):
        raise UserError(
            f"the tokenizer of {adapter} has ids up to {largest}, but the base's embedding has "
            f"{rows} rows: what was added to the tokenizer was never in the model, so train with "
            "the base's own tokenizer."
        )


def _largest_id(file: Path) -> int:
    return max((number for _, number in _vocabulary(file)), default=-1)


def _vocabulary(file: Path) -> Iterator[tuple[str, int]]:
    """Tokens and ids of a tokenizer.json; nothing where there is none."""
    data = _object(file)
    added = data.get("added_tokens")
    for entry in added if isinstance(added, list) else ():
        if isinstance(entry, dict) and isinstance(entry.get("content"), str):
            yield from ((entry["content"], i) for i in as_ids(entry.get("id")))
    model = data.get("model")
    pieces = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(pieces, dict):
        yield from ((token, i) for token, i in pieces.items() if type(i) is int and i >= 0)
    elif isinstance(pieces, list):  # a unigram model: pairs of piece and score
        for number, piece in enumerate(pieces):
            if isinstance(piece, list) and piece and isinstance(piece[0], str):
                yield piece[0], number


def _model(file: Path) -> Any:
    return _object(file).get("model")


def _ids_of_tokenizer(adapter: Path) -> Iterator[tuple[str, int]]:
    """Ids of the special tokens that tokenizer_config.json names, by the names of their keys."""
    config = _object(adapter / CONFIG)
    wanted = {}
    for key in ("eos_token", "bos_token", "pad_token"):
        value = config.get(key)
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            wanted[key] = token
    if not wanted:
        return
    ids: dict[str, int] = {}
    for token, number in _vocabulary(adapter / WHOLE):
        ids.setdefault(token, number)  # an added token comes first, and counts
    for key, token in wanted.items():
        if token in ids:
            yield key, ids[token]


def _object(file: Path) -> dict[str, Any]:
    """A JSON object; an empty one where the file is not there.

    Raises:
        UserError: the file is something else.
    """
    if not file.is_file():
        return {}
    data = read_json(file, LARGEST)
    if not isinstance(data, dict):
        raise UserError(f"{file} is damaged: expected a JSON object.")
    return data
