"""Settings as a file that `leanlift train --config` takes as it is, with the reason beside each."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leanlift.io.tensors import replacing

WIDTH = 80


@dataclass(frozen=True)
class Section:
    """Settings that belong together.

    Attributes:
        title: what they are about.
        keys: their values.
        why: a reason for some of them, in words.
    """

    title: str
    keys: Mapping[str, Any]
    why: Mapping[str, str]


def write_recipe(path: str | Path, head: Sequence[str], sections: Sequence[Section]) -> None:
    """Write settings and their reasons, whole or not at all.

    Args:
        path: of the file.
        head: lines about the whole.
        sections: the settings, in order.
    """
    with replacing(Path(path)) as temporary:
        temporary.write_text(recipe(head, sections), encoding="utf-8")


def recipe(head: Sequence[str], sections: Sequence[Section]) -> str:
    """The text of `write_recipe`."""
    lines = [line for text in head for line in _comment(text)]
    for section in sections:
        if not section.keys:
            continue
        lines += ["", f"# {section.title}"]
        for key, value in section.keys.items():
            written, reason = as_yaml(key, value), section.why.get(key)
            if reason is None:
                lines.append(written)
            elif len(written) <= 38 and len(reason) <= WIDTH - 42:
                lines.append(f"{written:<40}# {reason}")
            else:
                lines += [*_comment(reason), written]
    return "\n".join(lines) + "\n"


def as_yaml(key: str, value: Any) -> str:
    """One setting as YAML has it, on one line."""
    text: str = yaml.safe_dump(
        value, default_flow_style=True, allow_unicode=True, sort_keys=False, width=10_000
    )
    text = text.removesuffix("...\n").strip()  # how YAML ends a document that is a word
    return f"{key}: {text}"


def _comment(text: str) -> list[str]:
    if text.startswith("    "):  # a command
        return [f"# {text}"]
    return [f"# {line}".rstrip() for line in textwrap.wrap(text, WIDTH - 2) or [""]]
