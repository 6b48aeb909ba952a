"""A tokenizer of single characters, written as one that llama.cpp reads.

llama.cpp knows tokenizers by how they split a few test texts, and refuses all others. A small
tokenizer whose every token is one character (the built-in model's) is none of those it knows, but
what it does is what a SentencePiece vocabulary without any longer pieces does: each character is
its own token, a space written as "▁". So the same ids are written in that form. What comes of it is
compared with the original on a text of all its characters; where one id differs it is not used.

A character that the tokenizer does not have becomes its unknown token here; llama.cpp looks for a
token of its bytes, and has none.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

SPACE = "▁"
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_as_pieces(directory: Path) -> bool:
    """Rewrite the tokenizer of a checkpoint's directory if it is one of single characters.

    Returns:
        Whether it was; any other is left as it is.
    """
    file, config = directory / FILE, directory / CONFIG
    if not file.is_file() or not config.is_file():
        return False
    text = file.read_text(encoding="utf-8")
    given = Tokenizer.from_str(text)
    special = {token.content for token in given.get_added_tokens_decoder().values()}
    characters = given.get_vocab(with_added_tokens=True)
    plain = [token for token in characters if token not in special]
    if not plain or any(len(token) != 1 for token in plain) or SPACE in plain:
        return False
    pieces = _as_pieces(json.loads(text), characters)
    sample = "".join(sorted(plain)) * 2
    if Tokenizer.from_str(json.dumps(pieces)).encode(sample).ids != given.encode(sample).ids:
        return False
    file.write_text(json.dumps(pieces, ensure_ascii=False), encoding="utf-8")
    facts = json.loads(config.read_text(encoding="utf-8"))
    config.write_text(json.dumps({**facts, "add_prefix_space": False}), encoding="utf-8")
    return True


def _as_pieces(facts: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    """The same vocabulary as tokenizer.json has one of SentencePiece's."""
    model = {
        "type": "BPE",
        "byte_fallback": True,
        "fuse_unk": False,
        "unk_token": facts["model"].get("unk_token"),
        "vocab": {token.replace(" ", SPACE): id for token, id in vocabulary.items()},
        "merges": [],
    }
    return {
        **facts,
        "model": model,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }
