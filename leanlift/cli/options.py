"""The options of `leanlift train`, read out of the sources that declare them.

They are the fields of `RunArguments` and of `LiftSFTConfig`, which has TRL's and transformers'.
Importing those takes five seconds; reading them as text takes a tenth of one. So `--help` and a
mistyped key are answered at once, and nothing is listed twice: names, types, defaults and help
come from the dataclasses' own files. Where those are not where they are looked for, there is no
table, and what is wrong is said later, by the parser itself.
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.numbers import FALSE, TRUE

SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/sft_config.py", "SFTConfig"),
    ("leanlift", "training/arguments.py", "LiftSFTConfig"),
    ("leanlift", "training/arguments.py", "RunArguments"),
)
"""Package, file and class; a later one's fields replace an earlier one's."""

COMMAND = ("config", "fit", "dry_run", "help", "help_all")
"""Options of the command that are no fields."""

SCALARS = {"bool", "int", "float", "str"}


@dataclass(frozen=True)
class Option:
    """A field as its source has it.

    Attributes:
        kinds: the types that its annotation names, without None: "int", "str", "list[str]", …
        default: as it is written; None where there is none.
        help: one line; "" where it is not a plain text.
        required: whether it has no default.
        optional: whether its annotation names None.
    """

    name: str
    kinds: tuple[str, ...]
    default: str | None
    help: str
    required: bool
    optional: bool = False

    @property
    def is_bool(self) -> bool:
        """Whether it is a switch and nothing else."""
        return self.kinds == ("bool",)

    @property
    def takes_many(self) -> bool:
        """Whether its flag may take every value up to the next flag."""
        lists = [kind.startswith("list") for kind in self.kinds]
        return bool(lists) and (all(lists) or (any(lists) and not self.optional))

    def refuses(self, text: str) -> bool:
        """Whether a text can be no value of it, for certain: of numbers and switches alone."""
        if not set(self.kinds) <= {"bool", "int", "float"} or len(self.kinds) != 1:
            return False
        kind = self.kinds[0]
        if kind == "bool":
            return text.lower() not in (*TRUE, *FALSE)
        try:
            float(text) if kind == "float" else int(text)
        except ValueError:
            return True
        return False


@cache
def options() -> dict[str, Option] | None:
    """Every field by name; None where the sources are not as they are known."""
    found: dict[str, Option] = {}
    for package, file, name in SOURCES:
        fields = _fields(package, file, name)
        if fields is None:
            return None
        found |= fields
    return found


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


def defaults_of_mask() -> dict[str, str]:
    """Defaults that `RunArguments` takes from `LiftConfig`, as they are written there."""
    fields = _fields("leanlift", "config.py", "LiftConfig") or {}
    return {name: field.default for name, field in fields.items() if field.default is not None}


MEANT = {
    "batch_size": "per_device_train_batch_size",
    "data": "dataset_name",
    "dataset": "dataset_name",
    "epochs": "num_train_epochs",
    "lora_r": "rank_budget",
    "lr": "learning_rate",
    "model": "model_name_or_path",
    "output": "output_dir",
    "r": "rank_budget",
    "rank": "rank_budget",
    "save_dir": "output_dir",
    "steps": "max_steps",
}
"""Names that other tools have for the same."""


def take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    """The value of an option that is not a training argument, and the other arguments.

    Raises:
        UserError: it has no value.
    """
    value, rest = None, []
    pending = iter(argv)
    for argument in pending:
        key, equals, given = argument.partition("=")
        if key == name:
            value = given if equals else next(pending, "")
            if not value or (not equals and value.startswith("--")):
                raise UserError(f"{name} needs a value.")
        else:
            rest.append(argument)
    return value, rest


def near(wrong: str, names: Iterable[str]) -> str:
    """The end of a sentence about a name that does not exist."""
    wrong, names = wrong.partition("=")[0], list(names)
    dashes = wrong[: len(wrong) - len(wrong.lstrip("-"))]
    meant = MEANT.get(wrong.lstrip("-").replace("-", "_").lower())
    if meant is not None and f"{dashes}{meant}" in names:
        return f": did you mean {dashes}{meant}?"
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.7)
    return f": did you mean {close[0]}?" if close else ": see leanlift train --help_all."


def flags() -> list[str]:
    """Every spelling of every option, as a command line may have it."""
    names: list[str] = []
    for option in (options() or {}).values():
        names += _spellings(option.name)
        if option.is_bool and option.default == "True":
            names += _spellings(f"no_{option.name}")
    return [*names, *(f"--{name}" for name in COMMAND), "-h"]


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


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
    kinds = _kinds(node.annotation)
    optional = re.search(r"\b(None|Optional)\b", ast.unparse(node.annotation)) is not None
    return Option(node.target.id, kinds, default, text, default is None, optional)


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


def _kinds(annotation: ast.expr) -> tuple[str, ...]:
    """The alternatives of an annotation, None left out."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return (*_kinds(annotation.left), *_kinds(annotation.right))
    text = ast.unparse(annotation)
    for form in ("Optional[", "Union["):
        if text.removeprefix("typing.").startswith(form) and isinstance(annotation, ast.Subscript):
            inner = annotation.slice
            parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
            return tuple(kind for part in parts for kind in _kinds(part))
    return () if text == "None" else (text,)
