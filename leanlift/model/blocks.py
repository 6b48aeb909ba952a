"""Where the blocks of a model are, and those of the language model in one that sees or hears too.

Text reaches the blocks behind the embedding of tokens, and no others. So the language model is the
smallest part that has that embedding and blocks in it; what is beside it is a tower of its own, or
puts one's output among the tokens. No model family is named; where a tower lies within that part,
the words for what it takes are part of its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from leanlift.format import count
from leanlift.model.stacks import named_parts
from leanlift.weights.kinds import is_turned_linear
from leanlift.weights.quantized import is_quantized

OTHERS = re.compile(r"vision|visual|image|img|video|audio|speech|sound|vqmodel")
"""What parts are called that take something else than text."""


def inside_blocks(names: Mapping[str, nn.Module]) -> list[str]:
    """The modules inside the blocks of a model, given all of its modules by name."""
    return _inside(names, _block_lists(names))


def inside_language(names: Mapping[str, nn.Module]) -> set[str]:
    """Those of them that text goes through."""
    return set(_inside(names, in_language(names, _block_lists(names))))


def _inside(names: Mapping[str, nn.Module], blocks: list[str]) -> list[str]:
    inside = [name for name in names if any(name.startswith(f"{b}.") for b in blocks)]
    seen: set[int] = set()
    return [name for name in inside if not _is_again(names[name], seen)]


def _is_again(module: nn.Module, seen: set[int]) -> bool:
    """Whether a Linear has the weight of one before it, as in blocks that a model goes through
    several times: it is trained, saved and stored under the first name. `seen` is added to."""
    if not isinstance(module, nn.Linear) and not is_turned_linear(module):
        return False
    again = id(module.weight) in seen
    seen.add(id(module.weight))
    return again


def block_lists(model: nn.Module) -> list[str]:
    """The outermost module lists of a model that text goes through: where a transformer keeps its
    blocks."""
    names = named_parts(model)
    return in_language(names, _block_lists(names))


def _block_lists(names: Mapping[str, nn.Module]) -> list[str]:
    lists = [
        name for name, module in names.items() if isinstance(module, nn.ModuleList) and len(module)
    ]
    return [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]


def in_language(names: Mapping[str, nn.Module], lists: Iterable[str]) -> list[str]:
    """Of the lists of blocks of a model those that text goes through.

    Args:
        names: the modules of a model, by name.
        lists: names of its lists of blocks.
    """
    lists = list(lists)
    part = language_part(names, lists)
    start = f"{part}." if part else ""
    inside = [each for each in lists if each.startswith(start)]
    return [each for each in inside if not OTHERS.search(each.removeprefix(start))] or inside


def language_part(names: Mapping[str, nn.Module], lists: Iterable[str]) -> str:
    """The name of the smallest part that has the embedding of tokens and blocks in it; the whole
    model's, "", where it does not say which its embedding is."""
    model: Any = names[""]
    try:
        embedding = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return ""
    path = next((name for name, module in names.items() if module is embedding), "")
    lists = list(lists)
    while path and not any(each.startswith(f"{path}.") for each in lists):
        path = path.rpartition(".")[0]
    return path


def other_towers(names: Mapping[str, nn.Module]) -> dict[str, int]:
    """The parts beside the language model that have blocks of their own, and their weights, given
    all modules of a model by name."""
    lists = _block_lists(names)
    language = in_language(names, lists)
    towers: dict[str, int] = {}
    for each in lists:
        if each not in language:
            part = _outermost(each, language)
            towers.setdefault(part, sum(map(_weights, names[part].modules())))
    return towers


def _outermost(path: str, language: list[str]) -> str:
    """The largest part around a list of blocks that has none of the language model's in it."""
    parts = path.split(".")
    paths = (".".join(parts[:depth]) for depth in range(1, len(parts) + 1))
    return next(each for each in paths if not any(one.startswith(f"{each}.") for one in language))


def _weights(module: Any) -> int:
    own = dict(module.named_parameters(recurse=False))
    if is_quantized(module):
        rest = sum(tensor.numel() for key, tensor in own.items() if key != "weight")
        return int(module.in_features * module.out_features + rest)
    return sum(tensor.numel() for tensor in own.values())


def towers_lines(towers: Mapping[str, int]) -> list[str]:
    """What is said of them beside the table of what is trained."""
    return [
        f"  frozen   {name} ({count(weights)} weights): beside the language model"
        for name, weights in towers.items()
    ]
