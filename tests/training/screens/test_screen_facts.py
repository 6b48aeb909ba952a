"""What others write comes to the screen, and what Trainer says becomes facts."""

from __future__ import annotations

import ast
import html
import logging
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT
from snapshots import SCREENS
from telling import HEADER, Clock
from tqdm import std
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from leanlift.training.screens import (
    Memory,
    QuietScreen,
    Step,
)
from leanlift.training.screens.libraries import shown
from leanlift.training.watch import Watch


class Told(QuietScreen):
    """A screen that remembers."""

    takes_over = True

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.bars: list[tuple[str, float, float | None, float | None]] = []

    def note(self, lines: Any) -> None:
        self.notes += lines

    def progress(self, *bar: Any) -> None:
        self.bars.append(bar)


def test_bars_and_lines_of_others_come_to_the_screen(capfd: pytest.CaptureFixture[str]) -> None:
    told = Told()
    stream = logging.StreamHandler(sys.stderr)
    logger = logging.getLogger("another library")
    logger.addHandler(stream)

    def places() -> list[Any]:
        held = vars(std.tqdm)
        return [held["__init__"], held["display"], sys.stdout, sys.stderr, stream.stream]

    before = places()
    try:
        with pytest.raises(ZeroDivisionError), shown(told):
            for _ in tqdm(range(3), desc="Counting", mininterval=0):
                pass
            with tqdm(total=10, disable=None, leave=False) as bar:
                bar.update(4)
                bar.refresh()
            print("half a ", end="")
            print("line")
            sys.stderr.write("\rdrawn over\rthe last\n")
            logger.warning("a warning")
            warnings.warn_explicit("old", UserWarning, "lib.py", 3)
            raise ZeroDivisionError
    except UserWarning:  # warnings are errors here
        pass
    finally:
        logger.removeHandler(stream)
    assert told.notes[:3] == ["half a line", "the last", "a warning"]
    assert ("Counting", 3, 3) in [bar[:3] for bar in told.bars]
    assert ("", 4, 10) in [bar[:3] for bar in told.bars]
    assert places() == before
    assert capfd.readouterr() == ("", "")


# --- what Trainer says, as facts --------------------------------------------------------------


class Seen(QuietScreen):
    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, step: Step) -> None:
        self.steps.append(step)


def test_speed_and_time_left(tmp_path: Path) -> None:
    """Speed leaves refreshes and evaluations out; the time that is left does not."""
    clock, seen = Clock(), Seen()
    watch = Watch(seen, lambda state: replace(HEADER, steps=10), Memory, 4, clock)
    state = TrainerState(max_steps=10)
    rest = (TrainingArguments(tmp_path, use_cpu=True), state, TrainerControl())
    watch.on_train_begin(*rest)
    for number in range(1, 6):
        clock.now += 2
        state.global_step = number
        watch.on_step_end(*rest)
        if number == 4:
            clock.now += 6
            churn = dict.fromkeys(("churn", "retired", "held_back"), 0)
            logs = {f"refresh_{key}": value for key, value in {**churn, "seconds": 6}.items()}
            watch.on_log(*rest, logs=logs)
            watch.on_prediction_step(*rest, eval_dataloader=[1])
            clock.now += 5
            watch.on_evaluate(*rest)
        watch.on_log(*rest, logs={"loss": 1.0 / number, "num_tokens": 100.0 * number})
    logged = [step for step in seen.steps if step.loss is not None]
    assert [step.tokens_per_second for step in logged] == [50.0] * 5
    assert [step.seconds_left for step in logged[:3]] == [None] * 3
    assert logged[4].seconds_left == pytest.approx((4 + 11) / 2 * 5)
    watch.on_train_end(*rest)
    assert (watch.losses, watch.tokens, watch.seconds) == ([1.0, 0.2], 500, 16.0)


def test_only_screens_print() -> None:
    """A run tells facts: what training prints by itself would break a panel or JSON."""
    place = ROOT / "leanlift" / "training"
    for file in place.glob("*.py"):
        names = {
            node.func.id
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "print" not in names, file


def test_every_screen_has_its_picture() -> None:
    """Drawn by `docs/pictures.py`; its text is looked for, since rich's drawing may change."""
    docs = ROOT / "docs" / "pictures"
    for screen in SCREENS.glob("*.txt"):
        drawn = html.unescape((docs / f"{screen.stem}.svg").read_text(encoding="utf-8"))
        words = set(re.findall(r"[\w./→-]{3,}", screen.read_text(encoding="utf-8")))
        text = re.sub(r"<[^>]*>", "", drawn)
        assert [word for word in words if word not in text] == []
        assert "http" not in drawn.replace("http://www.w3.org/2000/svg", "")
