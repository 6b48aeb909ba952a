"""What a setting may be: in words, as a test, and how a text or a value of YAML is taken for one.

A class that declares settings (`LiftConfig`, `RunArguments`) gives each field a `Kind` and a help
text; the check of its values, the options of the command line, the keys of a YAML file and the
docstring are all made of these. Numbers of the training loop, which TRL and transformers declare
without a range, have their kinds in `NUMBERS`. Nothing heavy is imported: what is wrong with a
setting is said at once.
"""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import Field, dataclass, fields
from typing import Any

from leanlift.errors import UserError

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
"""What a switch may be, as a text."""

NONE = ("none", "null")
"""What nothing may be, as a text."""


NOT_TAKEN = (ValueError, TypeError, OverflowError, RecursionError)
"""What `Kind.take` raises."""


@dataclass(frozen=True)
class Kind:
    """What a setting may be.

    Attributes:
        what: in words, as they come after "expected NAME as".
        holds: whether a value is one.
        take: makes a value of a text, or of what YAML has read; one of `NOT_TAKEN` where it
            cannot. What it gives may still be out of range.
        switch: whether it is true or false, so that a flag needs no value.
        many: whether a flag takes every value up to the next flag.
    """

    what: str
    holds: Callable[[Any], bool]
    take: Callable[[Any], Any]
    switch: bool = False
    many: bool = False

    def check(self, name: str, value: Any) -> None:
        """Hold a value against it.

        Raises:
            UserError: it is none of these.
        """
        if not self.holds(value):
            raise UserError(f"expected {name} as {self.what}; got {value!r:.80}.")


# --- kinds ----------------------------------------------------------------------------------


def is_whole(value: Any) -> bool:
    """One that torch can take as a seed, a size or a step: 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def is_number(value: Any) -> bool:
    """A whole number, or a float that is neither infinite nor NaN."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _as_text(given: Any) -> str:
    if isinstance(given, (dict, list, tuple)) or given is None:
        raise TypeError
    return str(given)


def _as_word(given: Any) -> str:
    return "no" if given is False else _as_text(given)  # YAML takes the word for false


def _as_whole(given: Any) -> int:
    found = int(given) if isinstance(given, str) else given
    if not is_whole(found):
        raise TypeError
    return int(found)


def _as_number(given: Any) -> float:
    found = float(given) if isinstance(given, str) else given
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise TypeError
    return found


def _as_switch(given: Any) -> bool:
    if isinstance(given, str) and given.lower() in (*TRUE, *FALSE):
        return given.lower() in TRUE
    if not isinstance(given, bool):
        raise TypeError
    return given


TEXT = Kind("a text", lambda value: isinstance(value, str), _as_text)
WORD = Kind("a word", lambda value: isinstance(value, str), _as_word)
WHOLE = Kind("a whole number", is_whole, _as_whole)
NUMBER = Kind("a number", is_number, _as_number)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool), _as_switch, switch=True)
ANYTHING = Kind("anything", lambda value: True, lambda given: given)


def whole(words: str, test: Callable[[int], bool]) -> Kind:
    """A whole number with a range."""
    return Kind(f"a whole number, {words}", lambda v: is_whole(v) and test(v), _as_whole)


def number(words: str, test: Callable[[float], bool]) -> Kind:
    """A number with a range."""
    return Kind(f"a number, {words}", lambda v: is_number(v) and test(v), _as_number)


def one_of(*words: str) -> Kind:
    """A word of a few."""
    listed = " or ".join(words) if len(words) == 2 else f"one of {', '.join(words)}"
    return Kind(listed, lambda value: isinstance(value, str) and value in words, _as_word)


def optional(kind: Kind) -> Kind:
    """One of a kind, or none."""

    def take(given: Any) -> Any:
        nothing = given is None or (isinstance(given, str) and given.lower() in NONE)
        return None if nothing else kind.take(given)

    return Kind(
        f"{kind.what}, or none",
        lambda value: value is None or kind.holds(value),
        take,
        kind.switch,
        kind.many,
    )


SHARE = Kind("a number in (0, 1]", lambda v: is_number(v) and 0 < v <= 1, _as_number)
AT_LEAST_1 = whole("at least 1", lambda value: value >= 1)

ALL_LINEAR = "all-linear"
TARGET_PRESETS = (ALL_LINEAR, "attention", "mlp")
MOST_TOKENS = 100_000
MOST_PATTERNS, LONGEST_PATTERN = 64, 256  # compiled as they are read, from anyone's file


def _listed(given: Any) -> tuple[Any, ...]:
    """One value, or several; nothing is none."""
    many = tuple(given) if isinstance(given, (list, tuple)) else (given,)
    return () if [str(one).lower() for one in many] in ([""], *([word] for word in NONE)) else many


def _names(given: Any) -> tuple[Any, ...]:
    if not isinstance(given, (str, list, tuple)):
        raise TypeError
    return _listed(given)


def _targets(given: Any) -> Any:
    """A preset by its name; else endings of names."""
    names = _names(given)
    return names[0] if len(names) == 1 and names[0] in TARGET_PRESETS else names


def _tokens(given: Any) -> Any:
    return tuple(_as_whole(token) for token in _listed(given))


def _are_tokens(value: Any) -> bool:
    ids = isinstance(value, tuple) and all(is_whole(i) and 0 <= i < 2**31 for i in value)
    return ids and len(set(value)) == len(value) <= MOST_TOKENS


def _densities(given: Any) -> Any:
    """From the text of a flag, or the mapping of a file; nothing is no densities."""
    if given is None or given in NONE:
        return {}
    read = json.loads(given) if isinstance(given, str) else given
    if not isinstance(read, Mapping):
        raise TypeError
    return {str(pattern): float(density) for pattern, density in read.items()}


def _are_targets(value: Any) -> bool:
    return all(isinstance(n, str) and n for n in (value if isinstance(value, tuple) else (value,)))


def _are_densities(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and len(value) <= MOST_PATTERNS
        and all(isinstance(key, str) and len(key) <= LONGEST_PATTERN for key in value)
        and all(map(SHARE.holds, value.values()))
    )


TARGETS = Kind("a name or a list of names", _are_targets, _targets, many=True)
EXCLUDED = Kind("a name or a list of names", _are_targets, _names, many=True)
TOKENS = Kind(
    f"at most {MOST_TOKENS} different ids of tokens, with spaces between them (4 7) or as a list",
    _are_tokens,
    _tokens,
    many=True,
)
DENSITIES = Kind(
    'a mapping such as {"down_proj": 0.1}: at most '
    f"{MOST_PATTERNS} patterns of at most {LONGEST_PATTERN} characters, each with a density in "
    "(0, 1]",
    _are_densities,
    _densities,
)


# --- declarations ---------------------------------------------------------------------------


def about(kind: Kind, text: str) -> dict[str, Any]:
    """The metadata of a dataclass's field that is a setting.

    Args:
        kind: what it may be.
        text: its help; the first sentence stands for itself. No percent sign: argparse would take
            it for a format.
    """
    return {"kind": kind, "help": text}


def kind_of(field: Field[Any]) -> Kind:
    """The kind that a field was declared with."""
    kind: Kind = field.metadata["kind"]
    return kind


def brief(text: str) -> str:
    """The first sentence of a help text."""
    return text.partition(". ")[0].rstrip(".")


def check_fields(settings: Any) -> None:
    """Hold every field of a dataclass against its kind.

    Raises:
        UserError: one that is not of its kind.
    """
    for field in fields(settings):
        kind_of(field).check(field.name, getattr(settings, field.name))


def attributes(declared: type) -> str:
    """The help texts of a dataclass as the section of a docstring."""
    lines = ["    Attributes:"]
    for field in fields(declared):
        text = f"{field.name}: {field.metadata['help']}"
        indents = {"initial_indent": " " * 8, "subsequent_indent": " " * 12}
        lines += textwrap.wrap(text, 100, break_long_words=False, **indents)  # type: ignore[arg-type]
    return "\n".join([*lines, "    "])


# --- former names ---------------------------------------------------------------------------

FORMER_NAMES = {"settled_limit": "retired_limit", "quantize_ends": "quantize_embeddings"}
"""Keys of earlier releases, and what they are called today."""


def todays_names(
    given: Mapping[Any, Any], where: str, say: Callable[[str], None] = lambda line: None
) -> dict[Any, Any]:
    """Settings under the names that they have today.

    Args:
        given: keys and values; texts where a command line has them.
        where: what they come from, for messages.
        say: is told, in a line, of each former name.

    Raises:
        UserError: a setting under both of its names.
    """
    found = {key: value for key, value in given.items() if key not in FORMER_NAMES}
    for former, name in FORMER_NAMES.items():
        if former not in given:
            continue
        if name in found:
            raise UserError(
                f"{where} has both {name} and {former}, which is its former name: keep {name}."
            )
        say(f"{former} is called {name} today: {where} is read as if it said so.")
        found[name] = _as_meant(former, given[former])
    return found


def _as_meant(key: Any, value: Any) -> Any:
    """A negative settled_limit was no bound."""
    if key == "settled_limit":
        with suppress(ValueError, TypeError):
            return None if float(value) < 0 else value
    return value


# --- the training loop ----------------------------------------------------------------------

NOT_NEGATIVE = number("0 or more", lambda value: value >= 0)
COUNT = whole("0 or more", lambda value: value >= 0)
POSITIVE = number("more than 0", lambda value: value > 0)
BELOW_1 = number("in [0, 1)", lambda value: 0 <= value < 1)
AUTO = Kind(
    f"{AT_LEAST_1.what}, or auto",
    lambda value: value == "auto" or AT_LEAST_1.holds(value),
    lambda given: given if given == "auto" else _as_whole(given),
)

NUMBERS: Mapping[str, Kind] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": whole("at least 1, or -1 for num_train_epochs", lambda v: v >= 1 or v == -1),
    "num_train_epochs": POSITIVE,
    "max_length": optional(AT_LEAST_1),
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_1,
    "adam_beta2": BELOW_1,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "label_smoothing_factor": BELOW_1,
    "logging_steps": POSITIVE,
    "eval_steps": optional(POSITIVE),
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": optional(AT_LEAST_1),
    "dataset_num_proc": optional(AT_LEAST_1),
    "dataloader_num_workers": COUNT,
    "kept_blocks": COUNT,
    "eval_accumulation_steps": optional(AT_LEAST_1),
    "torch_empty_cache_steps": optional(AT_LEAST_1),
    "neftune_noise_alpha": optional(NOT_NEGATIVE),
    "router_aux_loss_coef": optional(NOT_NEGATIVE),
    "pad_to_multiple_of": optional(AUTO),
    "max_nonfinite_steps": AT_LEAST_1,
}
"""What the numbers of a training loop may be."""
