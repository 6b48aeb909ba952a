"""The house stays readable: short files and functions, no circle of imports, a true file tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

PACKAGE = ROOT / "leanlift"
LONGEST_FILE, LONGEST_FUNCTION = 350, 60

FILES = sorted(PACKAGE.rglob("*.py"))
SIZED = [*FILES, *sorted((ROOT / "benchmarks").rglob("*.py"))]
"""What has to be short; `test_suite` looks at the tests."""


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def imported(name: str, tree: ast.AST) -> Iterator[str]:
    """The modules of leanlift that a file imports, wherever in it.

    Importing a submodule runs its packages as well; a package's own list of what it offers is no
    circle, so they do not count.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some modules that import each other in a circle, or none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            found = visit(other, [*path, name])
            if found:
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


def test_no_file_and_no_function_is_long() -> None:
    long = [
        f"{path.relative_to(ROOT)} has {lines} lines"
        for path in SIZED
        if (lines := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST_FILE
    ]
    long += [
        f"{module_of(path)}.{node.name} has {node.end_lineno - node.lineno + 1} lines"
        for path in SIZED
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    ]
    assert long == []


def test_there_is_no_circle_of_imports() -> None:
    graph = {
        name: {other for other in imported(name, tree) if other != name}
        for name, tree in MODULES.items()
    }
    assert circle(graph) == []


@pytest.mark.parametrize(
    ("graph", "found"),
    [
        ({"a": {"b"}, "b": {"c"}, "c": set()}, []),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
        ({"a": {"a"}}, ["a", "a"]),
    ],
)
def test_a_circle_is_seen(graph: dict[str, set[str]], found: list[str]) -> None:
    assert circle(graph) == found


def test_the_readme_names_every_room_and_nothing_else() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("    leanlift/\n")[2]
    named = {
        line.split()[0].rstrip("/")
        for line in tree.partition("    tests/")[0].splitlines()
        if line.startswith("      ") and not line.startswith("       ")
    }
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "_version.py"}
    text = tree.partition("    tests/")[0]
    assert rooms <= named
    assert all(name in text for name in modules)
    assert {name for name in named if not name.endswith(".py")} <= rooms
