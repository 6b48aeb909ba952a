"""What is done of a method, and what is left: a file for each stage, written when it is whole.

    <output>/<suite>/<model>/base-<kind>.json      loss of the text before training
                             <method>/settings.json, trained.json, test-<name>.json, text.json
                                      run/          the adapter, or the model

A stage whose file is there is not done again. Settings that decide what comes out are kept, and
others are refused: a method begun under some is not gone on with under others.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import environment
from benchmarks.quality.identity import mark_of
from benchmarks.quality.paper.score import accuracy, text_loss
from benchmarks.quality.paper.suites import Suite
from benchmarks.quality.paper.task import Method, Task, device, load_base
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import Sample
from leanlift.io.files import read_json
from leanlift.io.tensors import write_json
from leanlift.measure import MemoryMeter

OF_NO_MATTER = {"save_strategy", "save_steps", "save_total_limit", "use_cpu", "disable_tqdm"}
"""Settings that do not change what comes out."""


@dataclass(frozen=True)
class Asked:
    """What every method is asked.

    Attributes:
        suite: that is run.
        tokenizer: of the base.
        tests: samples of each test set.
        limit: rows of each, at most, as the user has it.
        text: name of the text, and its passages.
        identity: of base and rows: what settings are kept with.
    """

    suite: Suite
    tokenizer: Any
    tests: Mapping[str, Sequence[Sample]]
    limit: int | None
    text: tuple[str, Sequence[str]]
    identity: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text_mark(self) -> dict[str, Any]:
        """By which a loss of the text is known."""
        name, texts = self.text
        return {"text": name, "texts": len(texts), "mark": mark_of(list(texts))}

    def test_mark(self, name: str) -> dict[str, Any]:
        """By which the result of a test set is known."""
        rows = [[s.prompt, s.expected, s.answer] for s in self.tests[name]]
        return {"limit": self.limit, "mark": mark_of(rows)}


@dataclass(frozen=True)
class Stages:
    """Those of one method.

    Attributes:
        name: of the method.
        method: how it is trained.
        task: what is trained.
        asked: what it is tested on.
    """

    name: str
    method: Method
    task: Task
    asked: Asked

    # --- what is there -----------------------------------------------------------------------

    def _file(self, name: str) -> Path:
        return self.task.output / f"{name}.json"

    def _read(self, path: Path, **wanted: Any) -> dict[str, Any] | None:
        """A stage's file; None where it is not there, or of other rows."""
        if not path.is_file():
            return None
        found: dict[str, Any] = read_json(path)
        return found if all(found.get(key) == value for key, value in wanted.items()) else None

    @property
    def trained(self) -> dict[str, Any] | None:
        """What was measured while it was trained."""
        return self._read(self._file("trained"))

    def test(self, name: str) -> dict[str, Any] | None:
        """The result of a test set."""
        return self._read(self._file(f"test-{name}"), **self.asked.test_mark(name))

    @property
    def text(self) -> dict[str, Any] | None:
        """The loss of the text after training."""
        return self._read(self._file("text"), **self.asked.text_mark)

    @property
    def _base_file(self) -> Path:
        return self.task.output.parent / f"base-{self.method.kind}.json"

    @property
    def base_text(self) -> dict[str, Any] | None:
        """The loss of the text before training."""
        return self._read(self._base_file, **self.asked.text_mark)

    @property
    def open_tests(self) -> list[str]:
        """Test sets without a result."""
        return [name for name in self.asked.tests if self.test(name) is None]

    @property
    def done(self) -> bool:
        """Whether nothing is left."""
        return bool(self.trained and self.text and self.base_text and not self.open_tests)

    def check_settings(self) -> None:
        """Whether what has begun was begun with these settings.

        Raises:
            UserError: it was not; names the first that differs.
        """
        now, path = self._settings(), self._file("settings")
        if not path.is_file():
            return
        before = read_json(path)
        for key in sorted({*now, *before}):
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{self.task.output} was begun with {key} = {before.get(key)}, and "
                    f"{now.get(key)} is asked for: choose another --output, or delete it."
                )

    def _settings(self) -> dict[str, Any]:
        own = {**self.method.settings(self.task), **self.asked.identity}
        kept = {key: value for key, value in own.items() if key not in OF_NO_MATTER}
        found: dict[str, Any] = json.loads(json.dumps(kept))
        return found

    # --- what is done ------------------------------------------------------------------------

    def go(self) -> None:
        """Do what is left, in order.

        Raises:
            OutOfMemoryError: it does not fit.
            UserError: input that cannot be used.
        """
        if self.base_text is None:
            model = load_base(self.task.model, self.method.kind)
            self._measure_text(model, self._base_file)
            del model
            _free()
        if self.trained is None:
            write_json(self._file("settings"), self._settings())
            facts = self.method.train(self.task)
            write_json(self._file("trained"), {**facts, "environment": environment()})
            _free()
        for path in self.task.run.glob("checkpoint-*"):
            shutil.rmtree(path)
        if self.text is None or self.open_tests:
            self._answer()
            _free()

    def _answer(self) -> None:
        """Everything that the trained model is tested on."""
        model = self.method.load(self.task)
        if self.text is None:
            self._measure_text(model, self._file("text"))
        for name in self.open_tests:
            samples = self.asked.tests[name]
            self.task.say(f"answering {len(samples):,} rows of {name}")
            meter = MemoryMeter(device())
            with meter.phase("test") as peak:
                right = accuracy(self.asked.suite, model, self.asked.tokenizer, samples)
            result = {
                "accuracy": right, "rows": len(samples), **self.asked.test_mark(name),
                "peak_bytes": peak.reserved or peak.resident or 0,
                "seconds": round(peak.seconds, 1),
            }  # fmt: skip
            write_json(self._file(f"test-{name}"), result)

    def _measure_text(self, model: Any, place: Path) -> None:
        loss = text_loss(model, self.asked.tokenizer, self.asked.text[1])
        write_json(place, {**self.asked.text_mark, "loss": loss})

    def row(self) -> dict[str, Any]:
        """The row of the table, of what is there."""
        facts, after, before = self.trained or {}, self.text or {}, self.base_text or {}
        tests = {name: found for name in self.asked.tests if (found := self.test(name))}
        right = {name: found["accuracy"] for name, found in tests.items()}
        peaks = [facts.get("peak_bytes", 0), *(found["peak_bytes"] for found in tests.values())]
        settings = self.method.settings(self.task)
        both = "loss" in after and "loss" in before
        return {
            "suite": self.asked.suite.name,
            "method": self.name,
            "held": self.method.kind,
            "learning_rate": settings.get("learning_rate", ""),
            **{key: facts.get(key, "") for key in FACTS},
            "tokens": self.task.rows.tokens,
            "peak_bytes": max(peaks),
            "text": after.get("text", ""),
            "loss_before": before.get("loss", ""),
            "loss_after": after.get("loss", ""),
            "forgetting": after["loss"] - before["loss"] if both else "",
            "limit": self.asked.limit or "",
            **right,
            "mean": sum(right.values()) / len(right) if right else "",
            **facts.get("environment", {}),
        }


FACTS = (
    "trained", "steps", "tokens_per_second", "seconds", "refreshes", "refresh_seconds",
    "peak_tensors",
)  # fmt: skip
"""Of a training, as they are."""


def _free() -> None:
    """Give memory back before the next model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
