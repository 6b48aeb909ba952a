"""From what the user gives to the table: look at everything, say what it costs, do what is left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.quality.identity import weights_mark
from benchmarks.quality.paper.cost import Shapes, in_hours, peak_of
from benchmarks.quality.paper.given import Given, base_of, card, check
from benchmarks.quality.paper.rows import texts_of, training_rows
from benchmarks.quality.paper.score import questions
from benchmarks.quality.paper.stages import Asked, Stages
from benchmarks.quality.paper.suites import Suite
from benchmarks.quality.paper.table import Row, markdown, write
from benchmarks.quality.paper.task import Task
from leanlift.data.tokenizer import load_tokenizer, prepare_tokenizer
from leanlift.errors import OutOfMemoryError
from leanlift.io.tensors import digest_of
from leanlift.training import LiftSFTConfig
from leanlift.training.checkpointing.lock import OutputLock

Say = Callable[[str], None]


def paper(suite: Suite, given: Given, say: Say = print, cost_alone: bool = False) -> list[Row]:
    """Run a suite's methods, as far as they are not done.

    Args:
        suite: one of `SUITES`.
        given: places and choices.
        say: is told of cost, progress and results.
        cost_alone: end when the cost is said.

    Returns:
        The rows of the table.

    Raises:
        UserError: something is missing, cannot be used, or was begun with other settings.
    """
    check(given, suite)
    base = base_of(given, suite)
    shapes = Shapes.of(given.model)
    stages = _look(suite, given, base, say)
    lacking = [name for name in suite.tests if name not in stages[0].asked.tests]
    if lacking:
        say(f"Not in {given.tests}, and left out: {', '.join(lacking)}.")
    _say_cost(stages, shapes, given, say)
    if cost_alone:
        return []
    name, memory = card()
    with OutputLock(stages[0].task.output.parent):
        for each in stages:
            needed = each.method.needs(shapes)
            if memory is not None and needed > memory and not each.done:
                say(
                    f"{each.name} is left out: it takes {needed / 1e9:.0f} GB at the least, and "
                    f"{name} has {memory / 1e9:.0f}."
                )
                continue
            try:
                each.go()
            except OutOfMemoryError as error:
                say(f"{each.name} does not fit: {error}")
                continue
            _write(stages, shapes, given, base)
    rows = _write(stages, shapes, given, base)
    say(markdown(rows, list(stages[0].asked.tests), suite.as_peft))
    return rows


def _look(suite: Suite, given: Given, base: str | None, say: Say) -> list[Stages]:
    """Everything about the input that can be wrong, before a weight is read."""
    setting = suite.setting(base)
    mask: dict[str, Any] = {}
    loop = dict(suite.loop)
    if setting is not None:
        mask = {
            "rank_budget": setting.rank, "approx_rank": setting.approx_rank,
            "refresh_interval": setting.interval,
        }  # fmt: skip
        loop["learning_rate"] = setting.lr
    root = given.output / suite.name / given.name
    tokenizer = prepare_tokenizer(load_tokenizer(given.model), LiftSFTConfig(use_cpu=True))
    together = {**loop, **given.loop}
    data, rows = training_rows(suite, given.data, root / "rows.jsonl", tokenizer, together)
    text = given.text_file
    tests = {
        name: questions(suite, path, tokenizer, given.limit)
        for name, path in given.test_files(suite).items()
    }
    weights = weights_mark(Path(given.model))
    identity = {"model": given.name, "weights": weights, "data": digest_of(given.data)}
    asked = Asked(suite, tokenizer, tests, given.limit, (text.name, texts_of(text)), identity)
    stages = []
    for name in given.of(suite):
        told = partial(_said, say, name)
        task = Task(given.model, data, root / name, mask, loop, given.loop, rows, told)
        stages.append(Stages(name, suite.methods[name], task, asked))
    for each in stages:
        each.check_settings()
    return stages


def _said(say: Say, name: str, line: str) -> None:
    say(f"{name}: {line}")


def _say_cost(stages: list[Stages], shapes: Shapes, given: Given, say: Say) -> None:
    """What is left to do, in operations, and in hours where the card is known."""
    name, _ = card()
    peak = given.tflops or peak_of(name)
    total = 0
    for each in stages:
        if each.trained is None:
            operations = each.method.operations(each.task, shapes)
            total += operations
            say(
                f"{each.name}: to train {each.task.rows.tokens:,} tokens in "
                f"{each.task.rows.steps:,} steps, {in_hours(operations, peak, name)}"
            )
        if each.open_tests:
            say(f"{each.name}: {_answers(each, shapes)}")
    if total:
        say(f"Training in all: {in_hours(total, peak, name)}; less where a run goes on.")


def _answers(stages: Stages, shapes: Shapes) -> str:
    """What answering takes, which memory bounds and no peak: operations and batches."""
    samples = [s for name in stages.open_tests for s in stages.asked.tests[name]]
    suite = stages.asked.suite
    new, prompts = len(samples) * suite.new_tokens, sum(len(s.prompt) for s in samples)
    operations = shapes.answers(prompts, new)
    return (
        f"to answer {len(samples):,} test rows, at most {new:,} tokens in batches of "
        f"{suite.test_batch} and {operations / 1e15:,.3g} PFLOP (every token reads the weights)"
    )


def _write(stages: list[Stages], shapes: Shapes, given: Given, base: str | None) -> list[Row]:
    """The rows of what is trained, into the CSV as well."""
    more: Mapping[str, Any] = {"model": given.name, "settings_of": base or ""}
    rows = []
    for each in stages:
        if each.trained is not None:
            pflop = each.method.operations(each.task, shapes) / 1e15
            rows.append({**each.row(), **more, "pflop": f"{pflop:.4g}"})
    if rows:
        write(given.results / f"quality_paper_{given.name}.csv", rows)
    return rows
