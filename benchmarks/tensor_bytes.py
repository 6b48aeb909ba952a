"""A safetensors reader and writer of their own, which say nothing about whether a file is valid.

Used by `adapter_mutations` and `adapter_content`.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

Header = dict[str, Any]

NUMPY_DTYPES = {"F32": "<f4", "F16": "<f2", "I32": "<i4", "I64": "<i8", "U8": "|u1", "BF16": "<u2"}


def parse(data: bytes) -> tuple[Header, bytes]:
    """Header and data of a valid safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: bytes, body: bytes, length: int | None = None) -> bytes:
    """A file with this header; `length` is what it says the header's length is."""
    return (len(header) if length is None else length).to_bytes(8, "little") + header + body


def arrays(data: bytes) -> dict[str, tuple[str, Any]]:
    """name -> (dtype, array) of a valid file; BF16 as its bit patterns."""
    header, body = parse(data)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            kind = NUMPY_DTYPES[entry["dtype"]]
            array = np.frombuffer(body[start:stop], kind).reshape(entry["shape"])
            found[name] = (entry["dtype"], array.copy())
    return found


def build(tensors: dict[str, tuple[str, Any]]) -> bytes:
    """The opposite of `arrays`."""
    header: Header = {}
    body = b""
    for name, (dtype, array) in tensors.items():
        data = array.astype(NUMPY_DTYPES[dtype]).tobytes()
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [len(body), len(body) + len(data)],
        }
        body += data
    return join(json.dumps(header).encode(), body)
