"""What the user gives, and what of it is missing: said at once, before anything slow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.common import RESULTS
from benchmarks.quality.paper.suites import BASES, Suite
from leanlift.errors import UserError, first_line

ENDINGS = ("json", "jsonl", "parquet", "csv")
SAMPLES = Path(__file__).parents[1] / "samples" / "prose.txt"
"""The text that forgetting is measured on where none is given; not PEFT's."""


@dataclass(frozen=True)
class Given:
    """Places and choices.

    Attributes:
        model: directory of the base.
        data: file of the training rows.
        tests: directory of the test sets, a file of rows each, named after it.
        text: what forgetting is measured on: a text file, passages apart by lines of ***, or rows
            with a column text.
        output: where runs and results go.
        methods: names; none: all of the suite.
        base: the paper's name of the base whose settings are taken; None: by config.json.
        loop: fields of LiftSFTConfig in place of the suite's.
        limit: rows of each test set, at most.
        tflops: peak of the card; None: by its name.
        results: directory of the CSV.
    """

    model: str
    data: Path
    tests: Path
    output: Path
    text: Path | None = None
    methods: tuple[str, ...] = ()
    base: str | None = None
    loop: Mapping[str, Any] = field(default_factory=dict)
    limit: int | None = None
    tflops: float | None = None
    results: Path = RESULTS

    @property
    def name(self) -> str:
        """Of the model, for files."""
        return Path(self.model).resolve().name.lower().replace(" ", "-")

    def of(self, suite: Suite) -> list[str]:
        """The names of the methods to run.

        Raises:
            UserError: the suite has no such method.
        """
        unknown = [name for name in self.methods if name not in suite.methods]
        if unknown:
            raise UserError(
                f"the suite {suite.name} has no method {', '.join(unknown)}: expected some of "
                f"{', '.join(suite.methods)}."
            )
        return list(self.methods or suite.methods)

    def test_files(self, suite: Suite) -> dict[str, Path]:
        """Those of the suite's test sets that are there, whatever the case of their names."""
        there = sorted(self.tests.iterdir()) if self.tests.is_dir() else []
        called = {path.name.lower(): path for path in there if path.is_file()}
        found = {}
        for name in suite.tests:
            places = [called.get(f"{name}.{ending}") for ending in ENDINGS]
            first = next((place for place in places if place is not None), None)
            if first is not None:
                found[name] = first
        return found

    @property
    def text_file(self) -> Path:
        """What forgetting is measured on."""
        return SAMPLES if self.text is None else self.text


def check(given: Given, suite: Suite) -> None:
    """Whether everything that a suite needs is there.

    Raises:
        UserError: names all that is not.
    """
    given.of(suite)
    missing = []
    if not (Path(given.model) / "config.json").is_file():
        missing.append(f"--model {given.model} (a directory with a config.json)")
    if not given.data.is_file():
        missing.append(f"--data {given.data} (a file of rows)")
    if not given.test_files(suite):
        names = ", ".join(suite.tests)
        missing.append(f"--tests {given.tests} (a directory with {names} as .json or the like)")
    if given.text is None and suite.as_peft:
        missing.append("--text (the first 100 texts of FineWiki, or others, which do not compare)")
    elif not given.text_file.is_file():
        missing.append(f"--text {given.text} (a file of texts)")
    if missing:
        raise UserError(f"nothing is downloaded here, and this is not there: {'; '.join(missing)}.")
    if given.limit is not None and given.limit < 1:
        raise UserError(f"expected a --limit of at least 1, got {given.limit}.")
    for option, value in (("lr", given.loop.get("learning_rate")), ("tflops", given.tflops)):
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"expected a --{option} above 0, got {value}.")


def base_of(given: Given, suite: Suite) -> str | None:
    """The paper's name of the base; None where the suite treats all alike.

    Raises:
        UserError: a base that the paper has no settings for, and none named.
    """
    if not suite.settings:
        return None
    base = given.base
    if base is None:
        try:
            config: Any = AutoConfig.from_pretrained(given.model).get_text_config()
        except Exception as error:  # each config class has its own ways to refuse
            raise UserError(f"{given.model} cannot be read: {first_line(error)}") from error
        names = ("hidden_size", "num_hidden_layers", "vocab_size")
        base = BASES.get(tuple(getattr(config, name, 0) for name in names))  # type: ignore[arg-type]
    if base not in suite.settings:
        raise UserError(
            f"the paper has no settings of the suite {suite.name} for {base or given.model}: name "
            f"whose to take with --settings_of, one of {', '.join(suite.settings)}."
        )
    return base


def card() -> tuple[str, int | None]:
    """Name and bytes of what is trained on; None: not a card."""
    if not torch.cuda.is_available():
        return "this CPU", None
    return torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
