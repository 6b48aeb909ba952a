"""Messages that the troubleshooting page quotes are ones that the code still has."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest
from processes import ROOT

GAP = "…"
"""What stands for anything, on the page and in a text of the code with something put in."""

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = [line[2:] for line in PAGE.splitlines() if line.startswith("> ")]


def text_of(node: ast.AST) -> str | None:
    """A text as it is written, with a gap for each value; None: it is none."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) or GAP for part in node.values)
    return None


def texts() -> Iterator[str]:
    """Every text of the package that is no docstring's alone."""
    for path in sorted((ROOT / "leanlift").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (text := text_of(node)) and " " in text:
                yield text


def is_said(quoted: str, said: list[str]) -> bool:
    """Whether a text begins as a message that is quoted, gaps for anything on both sides."""
    pieces = [piece.strip() for piece in re.split(rf"[{GAP}\s]*{GAP}[{GAP}\s]*", quoted)]
    pieces = [" ".join(piece.split()) for piece in pieces if len(piece) > 2]
    return any(all(piece in text for piece in pieces) for text in said)


@pytest.fixture(scope="module")
def said() -> list[str]:
    return list(texts())


def test_each_message_that_is_quoted_is_said(said: list[str]) -> None:
    assert len(QUOTED) > 25
    assert [quoted for quoted in QUOTED if not is_said(quoted, said)] == []


@pytest.mark.parametrize(
    ("quoted", "there"),
    [
        ("… has an unknown key …", True),
        ("… has an unheard key …", False),
        ("the least setting needs …, and more", False),
        ("training stopped at step …: offsets of … are NaN or infinite", True),
        ("offsets of … are NaN: training stopped at dawn", False),
    ],
)
def test_a_message_that_nobody_says_is_found(quoted: str, there: bool, said: list[str]) -> None:
    assert is_said(quoted, said) is there
