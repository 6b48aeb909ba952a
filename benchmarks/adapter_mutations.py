"""Ways to damage an adapter's files, each named; used by `fuzz_adapter`.

A mutation takes a random generator and the files of a valid adapter (name -> bytes), and changes
the files in place.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.tensor_bytes import NUMPY_DTYPES, Header, arrays, build, join, parse

Files = dict[str, bytes]

WEIGHTS = "adapter_model.safetensors"
ODD_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 64, 128, 255, 2**16, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, 0.5, -0.5, 1e-300,
    1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
ODD_NAMES = (
    "", ".", "..", "../x", "a/../../b", "/etc/passwd", "__class__", "model", "lm_head",
    "model.norm", "model.embed_tokens", "model.layers", "model.layers.0.mlp", "\0", "\ud800",
    "\x1b[2J", "~nobody-at-all/x", "x" * 300, "x" * 9000, "a" + ".b" * 500, "(", "(a)\\1", "(?i)a",
    "[[a", "float16", "bfloat16", "float32", "random", "gradient", "nf4", "int8", "dense",
)  # fmt: skip
ODD_DTYPES = (
    "F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL", "U16", "U32", "U64",
    "F8_E4M3", "F8_E5M2", "F4", "C64", "X9",
)  # fmt: skip


class Executed:
    """Unpickling one runs code: it makes a directory of this name."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.mkdir, (self.mark,))


# --- JSON beside the tensors ---------------------------------------------------------------


def _nodes(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all nodes below the root."""
    keys: Any = tree.keys() if isinstance(tree, dict) else range(len(tree))
    found = []
    for key in keys:
        found.append((*path, key))
        if isinstance(tree[key], (dict, list)):
            found += _nodes(tree[key], (*path, key))
    return found


def _parent(tree: Any, path: tuple[Any, ...]) -> Any:
    for key in path[:-1]:
        tree = tree[key]
    return tree


def _edit_json(chance: random.Random, files: Files, edit: Callable[[Any, Any, Any], None]) -> None:
    name = chance.choice(sorted(name for name in files if name.endswith(".json")))
    try:
        tree = json.loads(files[name])
        path = chance.choice(_nodes(tree))
    except (ValueError, TypeError, IndexError, AttributeError, RecursionError):
        return  # an earlier mutation has left no tree here
    edit(tree, _parent(tree, path), path[-1])
    files[name] = json.dumps(tree).encode()


def _odd(chance: random.Random) -> Any:
    return copy.deepcopy(
        chance.choice(
            (
                chance.choice(ODD_NUMBERS),
                chance.choice(ODD_NAMES),
                None,
                True,
                [],
                {},
                [1, 2],
                [[]],
                {"a": 1},
                [2**31 - 1, 2**31 - 1],
                [2**20, 2**20],
            )
        )
    )


def config_value(chance: random.Random, files: Files) -> None:
    """Another value of the same type."""

    def edit(tree: Any, parent: Any, key: Any) -> None:
        old = parent[key]
        if isinstance(old, bool):
            parent[key] = not old
        elif isinstance(old, (int, float)):
            near = (old + 1, old - 1, old * 2, -old)
            parent[key] = chance.choice((*near, *ODD_NUMBERS))
        elif isinstance(old, str):
            parent[key] = chance.choice((*ODD_NAMES, old + "x", old[1:], old.upper(), "../" + old))
        elif isinstance(old, list):
            chance.choice((old.reverse, old.clear, lambda: old.extend(old)))()
        elif isinstance(old, dict) and old:
            old.pop(chance.choice(sorted(old)))

    _edit_json(chance, files, edit)


def config_type(chance: random.Random, files: Files) -> None:
    """A value of any type in any place."""

    def edit(tree: Any, parent: Any, key: Any) -> None:
        parent[key] = _odd(chance)

    _edit_json(chance, files, edit)


def config_key(chance: random.Random, files: Files) -> None:
    """A key that is gone, new or renamed, or a subtree that stands somewhere else."""

    def edit(tree: Any, parent: Any, key: Any) -> None:
        where = chance.randrange(4)
        if where == 0:
            parent.pop(key)
        elif isinstance(parent, list):
            parent.insert(key, _odd(chance))
        elif where == 1:
            parent[chance.choice(ODD_NAMES)] = _odd(chance)
        elif where == 2:
            parent[chance.choice(ODD_NAMES)] = parent.pop(key)
        else:
            other = chance.choice(_nodes(tree))
            moved = copy.deepcopy(_parent(tree, other)[other[-1]])
            parent[key] = moved

    _edit_json(chance, files, edit)


def config_text(chance: random.Random, files: Files) -> None:
    """JSON as text: keys twice, endless nesting, numbers without end, bytes that are no UTF-8."""
    name = chance.choice(sorted(name for name in files if name.endswith(".json")))
    text = files[name]
    at = chance.randrange(len(text) + 1)
    if chance.random() < 0.5 and b"{" in text:
        at = chance.choice([i + 1 for i, byte in enumerate(text) if byte in b"{["])
    insert = chance.choice(
        (
            b'"peft_type": "LEANLIFT", ',
            b'"shapes": {}, ',
            b'"format_version": 9, ',
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"9" * 5000 + b",",
            b"\xff\xfe",
            b"\xef\xbb\xbf",
            b"\0",
            b"NaN,",
            b" " * 1000,
        )
    )
    files[name] = text[:at] + insert + text[at:]


# --- the safetensors file ------------------------------------------------------------------


def _edit_header(chance: random.Random, files: Files, edit: Callable[[Header, str], None]) -> None:
    try:
        header, body = parse(files[WEIGHTS])
        names = sorted(name for name in header if name != "__metadata__")
        edit(header, chance.choice(names))
    except (KeyError, ValueError, IndexError, TypeError, RecursionError):
        return  # an earlier mutation has left no header here
    files[WEIGHTS] = join(json.dumps(header).encode(), body)


def header_entry(chance: random.Random, files: Files) -> None:
    """Another dtype, shape or place than the bytes have."""

    def edit(header: Header, name: str) -> None:
        entry = header[name]
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        other = header[chance.choice(sorted(set(header) - {"__metadata__"}))]
        match chance.randrange(8):
            case 0:
                entry["dtype"] = chance.choice(ODD_DTYPES)
            case 1:
                entry["shape"] = chance.choice(
                    ([], [2**62, 4], [2**63, 0], [2**31, 2**31], [*shape, 1], [1, *shape], [-1])
                )
            case 2:
                entry["shape"] = [size + chance.choice((-1, 0, 1)) for size in shape]
            case 3:
                entry["shape"] = shape[::-1]
            case 4:
                entry["data_offsets"] = chance.choice(
                    ([stop, start], [start, stop + 8], [start + 4, stop], [0, 2**63], [-8, stop])
                )
            case 5:
                entry["data_offsets"] = list(other["data_offsets"])
            case 6:
                for key in ("dtype", "shape", "data_offsets"):
                    entry[key], other[key] = other[key], entry[key]
            case _:
                entry[chance.choice(sorted(entry))] = _odd(chance)

    _edit_header(chance, files, edit)


def header_name(chance: random.Random, files: Files) -> None:
    """A tensor that is called otherwise, as another one, or not there."""

    def edit(header: Header, name: str) -> None:
        odd, (stem, dot, part) = chance.choice(ODD_NAMES), name.rpartition(".")
        other = chance.choice(sorted(set(header) - {"__metadata__"}))
        new = chance.choice((odd, odd + dot + part, stem + dot + odd, name + "x", "../" + name))
        match chance.randrange(4):
            case 0:
                header.pop(name)
            case 1:
                header[name], header[other] = header[other], header[name]
            case 2:
                header[new] = dict(header[name])
            case _:
                header[new] = header.pop(name)

    _edit_header(chance, files, edit)


def header_length(chance: random.Random, files: Files) -> None:
    """A length of the header that lies."""
    data = files[WEIGHTS]
    true = int.from_bytes(data[:8], "little")
    near = (true - 1, true + 1, true + 8, true // 2, len(data), len(data) - 8)
    false = chance.choice((*near, 0, 1, 7, 8, 10**8, 2**31, 2**32, 2**63, 2**64 - 8, 2**64 - 1))
    files[WEIGHTS] = max(0, false).to_bytes(8, "little") + data[8:]


def tensor_bytes(chance: random.Random, files: Files) -> None:
    """Single bytes of the tensor file."""
    data = bytearray(files[WEIGHTS])
    for _ in range(chance.choice((1, 1, 2, 5, 50))):
        if data:
            data[chance.randrange(len(data))] = chance.choice((0, 1, 255, chance.randrange(256)))
    files[WEIGHTS] = bytes(data)


def truncation(chance: random.Random, files: Files) -> None:
    """Any file, cut off or with something after its end."""
    name = chance.choice(sorted(files))
    data = files[name]
    if chance.random() < 0.8:
        files[name] = data[: chance.randrange(len(data) + 1)]
    else:
        files[name] = data + bytes(chance.choice((1, 8, 1000)))


def splice(chance: random.Random, files: Files) -> None:
    """A piece of a file copied over, or into, another place of the same file."""
    name = chance.choice(sorted(files))
    data = files[name]
    size = chance.choice((1, 8, 64, 512))
    start, to = chance.randrange(len(data) + 1), chance.randrange(len(data) + 1)
    stop = to + chance.choice((0, size))
    files[name] = data[:to] + data[start : start + size] + data[stop:]


def tensor_content(chance: random.Random, files: Files) -> None:
    """A file that is well formed, with other content."""
    try:
        tensors = arrays(files[WEIGHTS])
        name = chance.choice(sorted(tensors))
        dtype, array = tensors[name]
        flat = array.reshape(-1)
        at = chance.randrange(max(1, flat.size))
    except (KeyError, ValueError, IndexError, TypeError, RecursionError):
        return  # an earlier mutation has left no tensors here
    array = np.atleast_1d(array)  # a count of steps has no dimension
    match chance.randrange(9):
        case 0 if flat.size:
            odd = (math.nan, math.inf, -math.inf, 3.4e38, 1e-45, 6e4, -0.0)
            flat[at] = chance.choice(odd) if dtype in ("F32", "F16") else chance.choice((0, 1, 255))
        case 1 if flat.size:
            flat[at] = flat[chance.randrange(flat.size)]
        case 2:
            array = array[..., :-1]
        case 3:
            array = np.concatenate([array, array[..., -1:]], axis=-1)
        case 4:
            array = array[..., ::-1]
        case 5:
            dtype = chance.choice(sorted(NUMPY_DTYPES))
            array = np.nan_to_num(array.astype(np.float64), posinf=0, neginf=0).clip(0, 255)
        case 6 if flat.size and dtype in ("I32", "I64"):
            flat[at] = chance.choice((-1, -(2**31), 2**31 - 1, 63, 64, 300))
        case 7:
            array = array.reshape(1, *array.shape)
        case _:
            if flat.size:
                other = chance.randrange(flat.size)
                flat[at], flat[other] = flat[other], flat[at]
    tensors[name] = (dtype, array)
    files[WEIGHTS] = build(tensors)


def whole_file(chance: random.Random, files: Files) -> None:
    """A file that is gone, empty, or a pickle."""
    name = chance.choice(sorted(files))
    match chance.randrange(3):
        case 0:
            files.pop(name)
        case 1:
            files[name] = b""
        case _:
            files[name] = pickle.dumps(Executed("executed"))


MUTATIONS: tuple[Callable[[random.Random, Files], None], ...] = (
    config_value,
    config_type,
    config_key,
    config_text,
    header_entry,
    header_name,
    header_length,
    tensor_bytes,
    tensor_content,
    truncation,
    splice,
    whole_file,
)
