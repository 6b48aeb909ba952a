"""How the tests themselves are kept: apart from each other, short, and quick but for a few.

`make test` leaves out what is marked `thorough`. A kind of fault that is swept there has a cheap
representative that is not, so a file with thorough tests alone needs a reason.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

TESTS = ROOT / "tests"
LONGEST = 350
THOROUGH_ALONE: dict[str, str] = {
    "benchmarks/test_big_models.py": "plans of large models take seconds each",
    "training/test_kill.py": "kills processes; test_every_kill.py has what they leave on the disk",
}
"""Test files without a test in `make test` -> why."""


def imported(tree: ast.Module) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(name.name for name in node.names))


def is_thorough(marked: ast.AST) -> bool:
    return any(
        isinstance(node, ast.Attribute) and node.attr == "thorough" for node in ast.walk(marked)
    )


def thorough_tests(tree: ast.Module) -> dict[str, bool]:
    """The names of a file's tests -> whether all of the test is thorough, by it or by its file.

    A case of a parametrized test that is thorough leaves the others.
    """
    whole = any(
        isinstance(node, ast.Assign)
        and any(
            isinstance(target, ast.Name) and target.id == "pytestmark" for target in node.targets
        )
        and is_thorough(node.value)
        for node in tree.body
    )
    return {
        node.name: whole
        or any(is_thorough(mark) for mark in node.decorator_list if not parametrizes(mark))
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def parametrizes(mark: ast.expr) -> bool:
    function = mark.func if isinstance(mark, ast.Call) else mark
    return isinstance(function, ast.Attribute) and function.attr == "parametrize"


def complaints(name: str, text: str, alone: dict[str, str]) -> list[str]:
    """What is wrong with a file of tests."""
    tree = ast.parse(text)
    found = [f"{name} imports {module}" for module in imported(tree) if module.startswith("test_")]
    if len(text.splitlines()) > LONGEST:
        found.append(f"{name} has {len(text.splitlines())} lines: split it along its subjects")
    tests = thorough_tests(tree)
    only_thorough = bool(tests) and all(tests.values())
    if only_thorough and name not in alone:
        found.append(f"{name} has nothing in `make test`: add a cheap case of what it sweeps")
    if not only_thorough and name in alone:
        found.append(f"{name} needs no reason: it has tests in `make test`")
    return found


def test_files_of_tests_are_short_apart_and_never_thorough_alone() -> None:
    files = {path.relative_to(TESTS).as_posix(): path for path in TESTS.rglob("*.py")}
    assert len(files) > 50
    assert [
        complaint
        for name, path in sorted(files.items())
        for complaint in complaints(name, path.read_text(encoding="utf-8"), THOROUGH_ALONE)
    ] == []
    assert set(THOROUGH_ALONE) <= set(files)


NO_ROOMS = {"house", "benchmarks"}
"""Directories of tests that are of no room: the repository itself, and what measures it."""


def strays(tests: Path, package: Path) -> list[str]:
    """Directories with tests that are named like no room of the package."""
    folders = {path.parent.relative_to(tests).as_posix() for path in tests.rglob("test_*.py")}
    return sorted(
        folder
        for folder in folders - NO_ROOMS
        if not ((package / folder).is_dir() or (package / f"{folder}.py").is_file())
        or folder == "."
    )


def untested(tests: Path, package: Path) -> list[str]:
    """Rooms of the package without tests of their own."""
    rooms = {path.parent.name for path in package.glob("*/__init__.py")}
    return sorted(room for room in rooms if not any((tests / room).rglob("test_*.py")))


def test_tests_mirror_the_rooms(tmp_path: Path) -> None:
    assert strays(TESTS, ROOT / "leanlift") == []
    assert untested(TESTS, ROOT / "leanlift") == []
    for name in ("room/inner", "house", "stranger"):
        (tmp_path / "tests" / name).mkdir(parents=True)
        (tmp_path / "tests" / name / "test_it.py").touch()
    (tmp_path / "tests" / "test_it.py").touch()
    (tmp_path / "package" / "room").mkdir(parents=True)
    (tmp_path / "package" / "room" / "inner.py").touch()
    for name in ("room", "bare"):
        (tmp_path / "package" / name).mkdir(exist_ok=True)
        (tmp_path / "package" / name / "__init__.py").touch()
    assert strays(tmp_path / "tests", tmp_path / "package") == [".", "stranger"]
    assert untested(tmp_path / "tests", tmp_path / "package") == ["bare"]


MARK = "@pytest.mark.thorough\n"
ONE = "def test_one(): pass\n"
CASE = '@pytest.mark.parametrize("n", [1, pytest.param(9, marks=pytest.mark.thorough)])\n'


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (ONE, None),
        ("import test_other\n" + ONE, "imports test_other"),
        ("def f():\n    from test_other import g\n", "imports test_other"),
        ("from tests import test_other\n", "imports test_other"),
        ("\n" * (LONGEST + 1) + ONE, "split it"),
        (MARK + ONE, "nothing in `make test`"),
        ("pytestmark = [pytest.mark.thorough]\n" + ONE, "nothing in `make test`"),
        (MARK + ONE + "def test_two(): pass\n", None),
        (CASE + ONE, None),
        ("ROWS = []\n", None),
    ],
    ids=range(10),
)
def test_what_is_said_of_a_file(text: str, said: str | None) -> None:
    found = complaints("a.py", text, {})
    assert [said in line for line in found] == ([] if said is None else [True])
    if said == "nothing in `make test`":
        assert complaints("a.py", text, {"a.py": "takes minutes"}) == []
    elif said is None:
        assert "needs no reason" in complaints("a.py", text, {"a.py": "takes minutes"})[0]


def test_no_two_files_of_tests_have_one_name() -> None:
    """pytest imports them by their names alone."""
    names = Counter(file.name for file in TESTS.rglob("*.py") if file.name != "conftest.py")
    assert not [name for name, count in names.items() if count > 1]
