"""What `from leanlift import …` offers: all that its own signatures and docstrings speak of."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import leanlift

SOURCE = Path(leanlift.__file__).parent
CLASSES = {
    node.name
    for file in SOURCE.rglob("*.py")
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
}
"""Every class of the package, by name."""

TALKED_OF = re.compile(r"\b(?:[A-Z][a-z]+\w*[A-Z]\w*|[A-Z]\w*Error)\b")
"""A class in a sentence: two words in one. Others are words of English, too."""


def signatures(name: str) -> list[str]:
    """Every annotation of a public name, as its source has it."""
    thing: Any = getattr(leanlift, name)
    if inspect.isfunction(thing):
        return list(map(str, inspect.get_annotations(thing).values()))
    if not inspect.isclass(thing):
        return []
    found = list(map(str, inspect.get_annotations(thing).values()))
    for method, function in vars(thing).items():
        if isinstance(function, (classmethod, staticmethod)):
            function = function.__func__
        if isinstance(function, property):
            function = function.fget
        if inspect.isfunction(function) and (method == "__init__" or method[0] != "_"):
            found += map(str, inspect.get_annotations(function).values())
    return found


def words_of(name: str) -> set[str]:
    thing = getattr(leanlift, name)
    spoken = {word for text in signatures(name) for word in re.findall(r"\w+", text)}
    return spoken | set(TALKED_OF.findall(inspect.getdoc(thing) or ""))


@pytest.mark.parametrize("name", leanlift.__all__)
def test_what_a_public_name_speaks_of_is_public(name: str) -> None:
    assert words_of(name) & CLASSES <= set(leanlift.__all__)


def test_the_walk_sees_arguments_results_fields_and_errors() -> None:
    assert {"PlanSettings", "Objective", "MemoryPlan"} <= words_of("plan_memory")
    assert "MergeReport" in words_of("merge_adapter")
    assert "UserError" in words_of("get_lift_model")
    assert "Scorer" in words_of("LiftConfig")


def test_type_checkers_are_told_the_same() -> None:
    """Names and homes stand in imports for type checkers and in a table for the lazy import."""
    told = {
        alias.name: node.module
        for node in ast.walk(ast.parse((SOURCE / "__init__.py").read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("leanlift.")
        for alias in node.names
    }
    assert {name: home for name, home in told.items() if name != "__version__"} == leanlift._HOMES
    assert {*leanlift._HOMES, "__version__"} == set(leanlift.__all__) == set(dir(leanlift))


def test_the_package_says_that_it_has_types() -> None:
    assert (SOURCE / "py.typed").is_file()
