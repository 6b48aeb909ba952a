"""The screen of a run in its three forms, told the same facts; and what keeps others from it."""

from __future__ import annotations

import ast
import html
import io
import json
import logging
import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from events import EVENTS, INSIDE
from processes import ROOT
from rich.cells import cell_len
from rich.console import Console
from snapshots import SCREENS, assert_screen
from tqdm import std
from tqdm.auto import tqdm
from transformers import TrainerControl, TrainerState, TrainingArguments

from leanlift import UserError
from leanlift.training.screens import (
    FORMATS,
    Evaluation,
    FirstRow,
    Header,
    JsonScreen,
    Memory,
    Place,
    PlainScreen,
    QuietScreen,
    Refresh,
    Screen,
    Step,
    Summary,
    screen_of,
)
from leanlift.training.screens.libraries import shown
from leanlift.training.screens.panel import PanelScreen
from leanlift.training.watch import Watch

GIB = 2**30
HEADER = Header(
    model="mistralai/Mistral-7B-v0.3",
    entries=348_000_000,
    weights=7_250_000_000,
    matrices=224,
    rows=7473,
    tokens=1_310_000,
    longest=512,
    steps=1401,
    begun=0,
    epochs=3,
    batch=1,
    accumulate=16,
    planned=int(7.34 * GIB),
    room=8 * GIB,
    place="NVIDIA GeForce RTX 4060",
)
ROW = FirstRow(
    (("<s>[INST] What is 2 + 2?\n[/INST]", False), (" It is 4.\x1b[31m</s>", True)), 21, 8
)
REFRESH = Refresh(400, 0.1234, 1_230_000, 0, 42.0, 800)
SUMMARY = Summary(
    steps=1401,
    begun=0,
    seconds=5000.0,
    in_all=5123.0,
    tokens=3_930_000,
    first_loss=1.2345,
    last_loss=0.4321,
    before=1.311,
    after=0.5912,
    eval_rows=1319,
    memory=Memory(None, int(6.9 * GIB), int(6.79 * GIB)),
    refreshes=3,
    refresh_seconds=126.0,
    churn=0.0312,
    places=(
        Place("adapter", "runs/math", 870 * 2**20),
        Place("merged", "runs/math-merged", 14 * GIB),
    ),
    commands=(
        "leanlift report runs/math",
        "leanlift eval --adapter runs/math --data test.json",
        "leanlift export runs/math MERGED",
    ),
)


class Clock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def step(number: int, loss: float | None = None, **more: Any) -> Step:
    memory = Memory(int(6.1 * GIB), int(6.9 * GIB), int(6.79 * GIB))
    return Step(number, 1401, number / 467, loss, seconds_left=4321.0, memory=memory, **more)


def start(screen: Screen, clock: Clock) -> None:
    with screen.phase("Reading the rows"):
        clock.now += 0.2
    screen.first_row(ROW)
    with screen.phase("Loading the base"):
        clock.now += 31
        screen.progress("Loading weights", 120, 291, 44.0)
    screen.header(HEADER)


def middle(screen: Screen, clock: Clock) -> None:
    screen.evaluation(Evaluation(0, 1.311, 65.0))
    for number, loss in ((100, 1.2345), (200, 0.912), (300, 0.733), (400, 0.701)):
        clock.now += 60
        speed = {"learning_rate": 2e-4 - number * 1e-7, "tokens_per_second": 812.4}
        screen.step(step(number))
        screen.step(step(number, loss, **speed))
    screen.refresh(REFRESH)
    screen.note(["Step 401 is not applied: the loss is nan. Training goes on."])
    screen.step(step(401))


def end(screen: Screen) -> None:
    screen.evaluation(Evaluation(1401, 0.5912, 66.0))
    screen.summary(SUMMARY)


# --- the forms --------------------------------------------------------------------------------


def test_a_run_as_plain_lines() -> None:
    out, clock = io.StringIO(), Clock()
    screen = PlainScreen(out, clock)
    start(screen, clock)
    middle(screen, clock)
    end(screen)
    assert_screen(out.getvalue(), "train-plain")


@pytest.mark.parametrize("form", [PlainScreen, JsonScreen])
def test_a_stream_that_knows_few_characters_stops_no_run(form: Any) -> None:
    for encoding in ("ascii", "cp1252"):
        out, clock = io.BytesIO(), Clock()
        screen = form(io.TextIOWrapper(out, encoding=encoding), clock)
        start(screen, clock)
        middle(screen, clock)
        end(screen)
        assert len(out.getvalue().splitlines()) > 10


def panel(clock: Clock) -> tuple[PanelScreen, io.StringIO]:
    out = io.StringIO()
    return PanelScreen(out, clock), out


def drawn(screen: PanelScreen) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(screen.view())
    return out.getvalue()


def test_a_run_as_a_panel() -> None:
    clock = Clock()
    screen, out = panel(clock)
    start(screen, clock)
    assert_screen(out.getvalue() + drawn(screen), "train-start")
    out.truncate(0)
    out.seek(0)
    middle(screen, clock)
    screen.progress("evaluating", 30, 1319, 61.0)
    screen.stopping("Ctrl-C: saving a checkpoint after this step; once more quits at once.")
    assert_screen(out.getvalue() + drawn(screen), "train-middle")
    assert max(map(len, drawn(screen).splitlines())) == 77, "room for ^C, which a terminal writes"
    out.truncate(0)
    out.seek(0)
    end(screen)
    assert_screen(out.getvalue() + drawn(screen), "train-end")


class Paper:
    """A terminal that knows what rich's live display writes."""

    def __init__(self, text: str) -> None:
        self.lines, self.row = [""], 0
        for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", text):
            self._take(part)

    def _take(self, part: str) -> None:
        if part == "\n":
            self.row += 1
            self.lines += [""] * (self.row == len(self.lines))
        elif part == "\x1b[2K":
            self.lines[self.row] = ""
        elif part.startswith("\x1b") and part.endswith("A"):
            self.row -= int(part[2:-1])
        elif not part.startswith(("\x1b", "\r")):
            self.lines[self.row] += part


def test_nothing_of_the_panel_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its height changes while lines are printed above it and another thread draws."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("leanlift.training.screens.panel.REDRAWN", 1e-4)
    out = io.StringIO()
    screen = PanelScreen(out, forced=True)
    screen.open()
    try:
        screen.header(HEADER)
        for number in range(150):
            screen.progress("evaluating", number, 150, None) if number % 3 else None
            screen._refresh = REFRESH if number % 2 else None
            screen._stopping = "Ctrl-C" if number % 5 else ""
            screen.note([f"line {number}"])
        screen.summary(SUMMARY)
    finally:
        screen.close()
    lines = [line for line in Paper(out.getvalue()).lines if line]
    assert [line for line in lines if line.startswith("line ")] == [f"line {i}" for i in range(150)]
    assert not [line for line in lines if line[0] in "╭│╰"]
    assert lines[-1].endswith("MERGED")


def test_a_phase_is_shown_when_it_takes_longer_than_a_second() -> None:
    clock = Clock()
    screen, out = panel(clock)
    with screen.phase("Choosing the entries to train"):
        clock.now += 0.5
        assert drawn(screen).strip() == ""
        clock.now += 2.5
        assert drawn(screen).strip() == "⠼ Choosing the entries to train  3.0 s"
        screen.progress("Selecting", 56, 224, 9.0)
        assert "█████                56 of 224  9.0 s left" in drawn(screen)
    assert drawn(screen).strip() == ""
    assert out.getvalue() == "✓ Choosing the entries to train  3.0 s\n"
    with screen.phase("Saving the adapter"):
        clock.now += 0.5
    assert "Saving" not in out.getvalue()


def test_long_phases_say_where_they_are_in_plain_lines() -> None:
    out, clock = io.StringIO(), Clock()
    screen = PlainScreen(out, clock)
    with screen.phase("Merging"):
        for done in range(100):
            clock.now += 1
            screen.progress("Merging", done, 100, 100.0 - done)
    assert out.getvalue().splitlines() == [
        "Merging …",
        "Merging: 29 of 100, 1 min 11 s left",
        "Merging: 59 of 100, 41 s left",
        "Merging: 89 of 100, 11 s left",
    ]


def events(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def test_a_run_as_json_lines() -> None:
    out, clock = io.StringIO(), Clock()
    screen = JsonScreen(out, clock)
    screen.open()
    start(screen, clock)
    middle(screen, clock)
    screen.progress("evaluating", 1, 2, None)
    screen.stopping("Ctrl-C")
    screen.stopped(401, 1401, "runs/math/checkpoint-401", "leanlift train")
    end(screen)
    screen.close()
    found = events(out.getvalue())
    for event in found:
        assert set(event) == {"event", "seconds", *EVENTS[event["event"]]}
        for key, inside in INSIDE.items():
            held = event.get(key)
            for part in held if isinstance(held, list) else [held] if held else []:
                assert set(part) == inside
    assert {event["event"] for event in found} == set(EVENTS)
    assert [e["seconds"] for e in found] == sorted(e["seconds"] for e in found)
    steps = [event for event in found if event["event"] == "step"]
    assert [event["loss"] for event in steps] == [1.2345, 0.912, 0.733, 0.701]  # logged ones
    assert steps[0]["memory"]["planned"] == int(6.79 * GIB)
    assert {"text": "Ctrl-C", "event": "note"}.items() <= found[-4].items()
    out.truncate(0)
    screen.step(step(500, float("nan")))
    assert '"loss": null' in out.getvalue()


def test_the_events_are_documented() -> None:
    text = (ROOT / "docs" / "screens.md").read_text(encoding="utf-8")
    documented = {
        event: set(re.findall(r"`(\w+)`", keys))
        for event, keys in re.findall(r"^\| `(\w+)` \| ([^|]*) \|", text, re.MULTILINE)
    }
    assert documented == {**EVENTS, **INSIDE}


def test_the_form_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    made = {name: type(screen_of(name)) for name in FORMATS}
    assert made == {
        "auto": PlainScreen,
        "rich": PanelScreen,
        "plain": PlainScreen,
        "json": JsonScreen,
    }
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(screen_of("auto"), PanelScreen)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(screen_of("auto"), PlainScreen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(Terminal, "encoding", "cp1252")
    assert isinstance(screen_of("auto"), PlainScreen)
    with pytest.raises(UserError, match="auto, rich, plain, json, got 'loud'"):
        screen_of("loud")


# --- rows of all kinds ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "parts",
    [
        (("x" * 5000, False), ("y" * 5000, True)),
        (("a\nb\tc\r\nd" * 90, False), ("\x1b[2J\x07‮" * 90, True)),
        tuple((f"turn {i} ", bool(i % 2)) for i in range(200)),
        (("", True),),
        (("漢字" * 300, True),),
    ],
    ids=["long", "control characters", "many turns", "empty", "wide"],
)
def test_any_first_row_takes_a_few_lines(parts: tuple[tuple[str, bool], ...]) -> None:
    out = io.StringIO()
    PlainScreen(out).first_row(FirstRow(parts, 10, 5))
    lines = out.getvalue().splitlines()
    assert len(lines) <= 7
    assert all(cell_len(line) <= 80 and line.isprintable() for line in lines)
    colour = io.StringIO()
    PanelScreen(colour, forced=True).first_row(FirstRow(parts, 10, 5))
    assert "\x1b[2J" not in colour.getvalue()


# --- nothing else draws -----------------------------------------------------------------------


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
