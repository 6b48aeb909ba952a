"""The screen of a run in its three forms, told the same facts; and what keeps others from it."""

from __future__ import annotations

import io
import json
import re
import sys
from typing import Any

import pytest
from events import EVENTS, INSIDE
from processes import ROOT
from rich.cells import cell_len
from rich.console import Console
from snapshots import assert_screen
from telling import GIB, HEADER, REFRESH, SUMMARY, Clock, end, middle, start, step

from leanlift import UserError
from leanlift.training.screens import (
    FORMATS,
    FirstRow,
    JsonScreen,
    PlainScreen,
    screen_of,
)
from leanlift.training.screens.panel import PanelScreen

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
