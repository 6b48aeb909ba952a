"""Every public class, function, method and property says what it is or does.

A method may do without where the reader has been told already: its name is documented in a Protocol
of this package that it may satisfy, or in a class of this package that it overrides; or it
overrides what a library calls, which is the library's to document.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import ROOT

LIBRARY_CALLS = {
    "TrainerCallback": ("on_",),
    "Module": ("forward", "extra_repr"),
    "Function": ("forward", "backward"),
    "ArgumentParser": ("error",),
    "Optimizer": ("step",),
}
"""Library classes -> beginnings of the names of methods that a subclass may leave undocumented."""

Documented = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Public:
    """A public definition: where it stands, and the class that it belongs to."""

    where: str
    node: Documented
    owner: ast.ClassDef | None = None

    @property
    def text(self) -> str:
        return ast.get_docstring(self.node) or ""


def sources(folder: Path) -> Iterator[tuple[str, ast.Module]]:
    """The public modules of a folder, by their paths in it."""
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not any(part.startswith("_") and part != "__init__.py" for part in Path(name).parts):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def definitions(name: str, tree: ast.Module | ast.ClassDef) -> Iterator[Public]:
    """Public definitions of a module or class, and of the public classes in it."""
    owner = tree if isinstance(tree, ast.ClassDef) else None
    for node in tree.body:
        if isinstance(node, Documented) and not node.name.startswith("_"):
            yield Public(f"{name}.{node.name}", node, owner)
            if isinstance(node, ast.ClassDef):
                yield from definitions(f"{name}.{node.name}", node)


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).rpartition(".")[2] for base in node.bases]


def undocumented(modules: list[tuple[str, ast.Module]]) -> list[str]:
    """Where something is not said."""
    found = [public for name, tree in modules for public in definitions(name, tree)]
    classes = {p.node.name: p.node for p in found if isinstance(p.node, ast.ClassDef)}
    told = {(p.owner.name, p.node.name) for p in found if p.owner is not None and p.text}
    promised = {name for owner, name in told if "Protocol" in bases(classes[owner])}

    def known(owner: ast.ClassDef, name: str) -> bool:
        if name in promised:
            return True
        for base in bases(owner):
            if (base, name) in told or (base in classes and known(classes[base], name)):
                return True
            if name.startswith(LIBRARY_CALLS.get(base, ("\0",))):
                return True
        return False

    return [
        public.where
        for public in found
        if not public.text and not (public.owner and known(public.owner, public.node.name))
    ]


def test_what_is_public_is_documented() -> None:
    modules = list(sources(ROOT / "leanlift"))
    assert len(modules) > 100
    assert undocumented(modules) == []


BASES = '''
class Reads(Protocol):
    """Reads."""
    def rows(self):
        """Rows."""
class Hook(TrainerCallback):
    """Called."""
class Told:
    """Told."""
    def whole(self):
        """All of it."""
'''


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("def f(): pass", ["m.f"]),
        ('def f():\n    """F."""', []),
        ("def _f(): pass", []),
        ("class A: pass", ["m.A"]),
        ('class A:\n    """A."""\n    def f(self): pass', ["m.A.f"]),
        ('class A:\n    """A."""\n    def rows(self): pass', []),
        ('class A(Told):\n    """A."""\n    def whole(self): pass', []),
        (
            'class A(Hook):\n    """A."""\n    def on_log(self): pass\n    def log(self): pass',
            ["m.A.log"],
        ),
        ('class A(nn.Module):\n    """A."""\n    def forward(self): pass', []),
        ("class _A:\n    def f(self): pass", []),
    ],
    ids=range(10),
)
def test_what_is_missing(text: str, missing: list[str]) -> None:
    assert undocumented([("m", ast.parse(BASES + text))]) == missing
