"""A user's own function: found by its name, and what is wrong with it is one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset

from leanlift import UserError
from leanlift.data.functions import function_named
from leanlift.data.ready import formatted

SOURCE = """
def as_text(row):
    import beside_it
    return beside_it.mark + row["a"]

number = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mine", "beside_it", "broken", "package", "package.inner", "lacking"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    Path("mine.py").write_text(SOURCE)
    Path("beside_it.py").write_text("mark = '> '\n")
    Path("broken.py").write_text("def (\n")
    Path("lacking.py").write_text("import no_such_thing_at_all\n")
    Path("package").mkdir()
    Path("package", "__init__.py").touch()
    Path("package", "inner.py").write_text(SOURCE)
    return tmp_path


@pytest.mark.parametrize(
    "name", ["mine:as_text", "mine.as_text", "package.inner:as_text", "package.inner.as_text"]
)
def test_a_function_of_the_current_directory(here: Path, name: str) -> None:
    assert function_named(name, "formatting_func")({"a": "x"}) == "> x"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mine", "names no function: expected module:function"),
        (":f", "names no function"),
        ("mine:", "names no function"),
        ("mine:nothing", "mine has no function nothing"),
        ("mine:number", "mine has a int number"),
        ("nowhere:f", "there is no module nowhere in "),
        ("package.nowhere:f", r"there is no module package\.nowhere"),
        ("broken:f", "importing it fails with SyntaxError"),
        (
            "lacking:f",
            "importing it fails with ModuleNotFoundError: No module named 'no_such_thing",
        ),
    ],
)
def test_a_function_that_is_not_there(here: Path, name: str, said: str) -> None:
    with pytest.raises(UserError, match=f"setting '{name}' .*{said}"):
        function_named(name, "setting")


def as_stream(rows: list[dict[str, Any]]) -> IterableDataset:
    return IterableDataset.from_generator(lambda: iter(rows))


@pytest.mark.parametrize("source", [list, as_stream])
def test_rows_become_texts(source: Any) -> None:
    rows = [{"a": "x", "b": 1}, {"a": "y", "c": 2}]
    made = list(formatted(source(rows), lambda row: row["a"] * 2, "train"))
    assert made == [{"text": "xx"}, {"text": "yy"}]


@pytest.mark.parametrize("source", [list, as_stream])
@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda row: row["b"], "formatting_func fails on row 1 .* KeyError: there is no 'b'"),
        (lambda row: row.get("b"), "formatting_func returned a NoneType for row 1 of the train"),
    ],
)
def test_a_function_that_fails_names_the_row(source: Any, function: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        list(formatted(source([{"b": "x"}, {"a": "y"}]), function, "train"))
