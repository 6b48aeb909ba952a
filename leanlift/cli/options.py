"""The settings of `leanlift train` and `plan`, each as an option: what it may be, and its help.

Those of `RunArguments` come from its declaration. Those of the loop are the fields of
`LiftSFTConfig`, which has TRL's and transformers'. Importing that takes five seconds; reading its
sources as text takes a tenth of one. So `--help` and a mistyped key are answered at once, and
nothing is listed twice. Where those sources are not as they are known, there is no table, and what
is wrong is said later, by the classes themselves (`leanlift.cli.settings`).
"""

from __future__ import annotations

import ast
import re
from contextlib import suppress
from dataclasses import MISSING, dataclass, fields, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.methods import METHODS, SFT
from leanlift.run_arguments import RunArguments
from leanlift.settings import (
    ANYTHING,
    NUMBER,
    NUMBERS,
    SWITCH,
    TEXT,
    WHOLE,
    WORD,
    Kind,
    brief,
    kind_of,
    optional,
)


def sources(method: str) -> tuple[tuple[str, str, str], ...]:
    """Package, file and class; a later one's fields replace an earlier one's."""
    own = METHODS[method]
    return (
        ("transformers", "training_args.py", "TrainingArguments"),
        ("trl", "trainer/base_config.py", "_BaseConfig"),
        ("trl", own.config_file, own.config),
        ("leanlift", "training/arguments.py", "LiftArguments"),
    )


@dataclass(frozen=True)
class Option:
    """A setting as the command line has it.

    Attributes:
        kind: what it may be.
        default: as a person writes it; None where there is none.
        help: one line; "" where it is not a plain text.
        brief: the beginning of it that stands for itself; "" where somebody else wrote it.
    """

    name: str
    kind: Kind
    default: str | None
    help: str
    brief: str = ""

    @property
    def required(self) -> bool:
        """Whether it has no default."""
        return self.default is None


def run_options() -> dict[str, Option]:
    """Those that `RunArguments` declares."""
    found = {}
    for each in fields(RunArguments):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        written = (
            None if default is MISSING else "none" if default in (None, {}, ()) else str(default)
        )
        text = each.metadata["help"]
        found[each.name] = Option(each.name, kind_of(each), written, text.rstrip("."), brief(text))
    return found


def kind_of_types(name: str, types: tuple[str, ...], or_none: bool) -> Kind:
    """What a field of TRL's or transformers' may be, as far as that is known.

    Args:
        name: of the field.
        types: that its annotation names, without None: "int", "str", "list[str]", …
        or_none: whether it names None.
    """
    if name in NUMBERS:
        return NUMBERS[name]
    if name in WORDS:
        return optional(WORD) if or_none else WORD
    plain = {"bool": SWITCH, "int": WHOLE, "float": NUMBER}
    if set(types) == {"str", "bool"}:
        types = ("bool",)  # as transformers' own parser has it
    if len(types) == 1 and types[0] in plain:
        return optional(plain[types[0]]) if or_none else plain[types[0]]
    lists = [each.startswith("list") for each in types]
    if lists and (all(lists) or (any(lists) and not or_none)):
        return MANY
    return TEXT if types == ("str",) else ANYTHING


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


MANY = Kind("a list", lambda value: isinstance(value, list), _as_list, many=True)


@cache
def options(method: str = SFT) -> dict[str, Option] | None:
    """Every setting of a method by name; None where the sources are not as they are known."""
    found: dict[str, Option] = {}
    for package, file, name in sources(method):
        declared = _fields(package, file, name)
        if declared is None:
            return None
        if package == "leanlift":  # whose texts begin with what stands for itself
            declared = {key: replace(o, brief=brief(o.help)) for key, o in declared.items()}
        found |= declared
    if method != SFT:
        rate = str(METHODS[method].learning_rate)
        found["learning_rate"] = replace(found["learning_rate"], default=rate)
    return found | run_options()


WORDS = {
    "eval_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "logging_strategy": ("trainer_utils.py", "IntervalStrategy"),
    "lr_scheduler_type": ("trainer_utils.py", "SchedulerType"),
    "optim": ("training_args.py", "OptimizerNames"),
    "save_strategy": ("trainer_utils.py", "SaveStrategy"),
}
"""Fields that take a word of an enumeration of transformers': its file and class."""


@cache
def words_of(name: str) -> frozenset[str]:
    """What a field of `WORDS` may be; none where the source is not as it is known."""
    file, kind = WORDS[name]
    node = _class_of("transformers", file, kind)
    found = {
        str(part.value.value)
        for part in (node.body if node is not None else ())
        if isinstance(part, ast.Assign) and isinstance(part.value, ast.Constant)
    }
    return frozenset(found | set(SPARSE_OPTIMIZERS) if found and name == "optim" else found)


def _fields(package: str, file: str, name: str) -> dict[str, Option] | None:
    """The fields that a class of a package declares itself."""
    node = _class_of(package, file, name)
    if node is None:
        return None
    made = (_option(part) for part in node.body if isinstance(part, ast.AnnAssign))
    return {option.name: option for option in made if option is not None}


def _class_of(package: str, file: str, name: str) -> ast.ClassDef | None:
    """A class as its source has it; None where it is not there."""
    with suppress(OSError, SyntaxError, ImportError, ValueError):
        spec = find_spec(package)
        for place in (spec and spec.submodule_search_locations) or ():
            for node in _parsed(Path(place) / file).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
    return None


@cache
def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _option(node: ast.AnnAssign) -> Option | None:
    """An annotated name of a class as an option; None for one that no constructor takes."""
    if not isinstance(node.target, ast.Name):
        return None
    value, default, text = node.value, None, ""
    if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        if getattr(given.get("init"), "value", True) is False:
            return None
        default = _made(given.get("default_factory"))
        default = _written(given["default"]) if "default" in given else default
        text = _help(given.get("metadata"))
    elif value is not None:
        default = _written(value)
    name, types = node.target.id, _types(node.annotation)
    or_none = re.search(r"\b(None|Optional)\b", ast.unparse(node.annotation)) is not None
    return Option(name, kind_of_types(name, types, or_none), default, text)


def _written(node: ast.expr | None) -> str | None:
    """A default as a person writes it."""
    if node is None:
        return None
    with suppress(ValueError):
        value = ast.literal_eval(node)
        return "none" if value is None else str(value)
    return ast.unparse(node)


def _made(factory: ast.expr | None) -> str | None:
    return _written(factory.body if isinstance(factory, ast.Lambda) else factory)


def _help(metadata: ast.expr | None) -> str:
    with suppress(ValueError):
        found = ast.literal_eval(metadata) if metadata is not None else {}
        return " ".join(str(found.get("help", "")).split())
    return ""


def _types(annotation: ast.expr) -> tuple[str, ...]:
    """The alternatives of an annotation, None left out."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return (*_types(annotation.left), *_types(annotation.right))
    text = ast.unparse(annotation)
    for form in ("Optional[", "Union["):
        if text.removeprefix("typing.").startswith(form) and isinstance(annotation, ast.Subscript):
            inner = annotation.slice
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return tuple(each for part in parts for each in _types(part))
    return () if text == "None" else (text,)
