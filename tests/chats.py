"""Rows that are chats, as Python has them and as files do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


def call(**arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


ROWS = [
    {"messages": [USER, call(a=2, b=[1, {"x": None}])], "n": 1, "id": "1"},
    {"messages": [USER, call(zone=None, f=0.30000000000000004)], "n": 2.5, "tools": [{"a": 1}]},
    {"messages": [{**USER, "name": "123"}, {"content": "", "role": "assistant"}], "id": 7},
    {"messages": [USER, call(big=10**30, text="é\u2028")], "n": None, "id": "x"},
]
"""Columns and keys that are there or not, in one order or another; null, mixed and long values."""


def write(path: Path, rows: list[Any]) -> Path:
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    else:
        text = json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path
