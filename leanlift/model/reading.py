"""Whether the module that holds a Linear takes its weight and computes with it itself.

The scans of Mamba do, and a layer of ours in the Linear's place would not be asked. It is told from
the text of the module's class. What that does under a condition of its own settings alone, and they
say no, it does not do (BLOOM cuts its weights up under `slow_but_exact`); a condition that depends
on anything else may hold on another machine.
"""

from __future__ import annotations

import ast
import functools
import operator
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from leanlift.model.stacks import source_of

Condition = tuple[ast.expr, bool]
"""An expression, and what it has to be."""

COMPARISONS = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
    ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
}  # fmt: skip


def read_by_parent(names: Mapping[str, nn.Module], name: str) -> bool:
    """Whether the module that holds a Linear reads its weight.

    Args:
        names: the modules of a model, by name.
        name: of the Linear.
    """
    parent, _, leaf = name.rpartition(".")
    if parent not in names:
        return False
    holder, kind = names[parent], _kind(names[parent])
    return any(
        all(_truth(test, holder) in (wanted, None) for test, wanted in conditions)
        for conditions in _reads(kind, leaf)
    )


def _kind(module: nn.Module) -> Any:
    return type(module)


@functools.cache
def _reads(kind: Any, leaf: str) -> list[list[Condition]]:
    """The conditions of each place where a class reads the weight of what it calls so."""
    text = textwrap.dedent(source_of(kind))
    if not re.search(rf"\.{re.escape(leaf)}\.weight\b", text):
        return []
    return [found for node in ast.parse(text).body for found in _places(node, leaf, [])]


def _places(node: ast.AST, leaf: str, under: list[Condition]) -> Iterator[list[Condition]]:
    if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device", "shape"):
        if not _is_weight(node.value, leaf):  # which asks for nothing of its numbers
            yield from _places(node.value, leaf, under)
        return
    if _is_weight(node, leaf):
        yield under
    elif isinstance(node, ast.If | ast.IfExp):
        yield from _places(node.test, leaf, under)
        parts: list[tuple[Any, bool]] = [(node.body, True), (node.orelse, False)]
        for part, wanted in parts:
            for inner in part if isinstance(part, list) else [part]:
                yield from _places(inner, leaf, [*under, (node.test, wanted)])
    else:
        for inner in ast.iter_child_nodes(node):
            yield from _places(inner, leaf, under)


def _is_weight(node: ast.AST, leaf: str) -> bool:
    of = node.value if isinstance(node, ast.Attribute) and node.attr == "weight" else None
    return isinstance(of, ast.Attribute) and of.attr == leaf


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """Whether a condition of a module's code holds; None: its settings alone do not say."""
    if isinstance(test, ast.BoolOp):
        found = [_truth(part, module) for part in test.values]
        decides = isinstance(test.op, ast.Or)
        if decides in found:
            return decides
        return None if None in found else not decides
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        inner = _truth(test.operand, module)
        return None if inner is None else not inner
    try:
        return bool(_value(test, module))
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """No constant, and no setting of the module's."""


def _value(node: ast.expr, module: nn.Module) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        compare = COMPARISONS.get(type(node.ops[0]))
        if compare is not None:
            return compare(_value(node.left, module), _value(node.comparators[0], module))
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        found = vars(module).get(node.attr) if node.value.id == "self" else None
        if node.attr != "training" and isinstance(found, bool | int | float | str):
            return found
    raise _UnknownError
