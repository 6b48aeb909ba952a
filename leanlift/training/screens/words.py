"""Facts of a run in words: lines of at most 80 columns, for a terminal and for a log."""

from __future__ import annotations

import shlex
import textwrap
import unicodedata
from pathlib import Path

from leanlift.format import count, duration, kept_words, loss, share, size
from leanlift.training.screens.facts import (
    Evaluation,
    FirstRow,
    Header,
    Memory,
    Refresh,
    Step,
    Summary,
)

WIDTH = 80
LABEL = 12
"""Columns of what stands before a fact."""
FIRST_ROW_LINES = 6


def header_lines(header: Header) -> list[str]:
    """What is about to be trained, on what, and what it will take."""
    entries = f"{count(header.entries)} of {count(header.weights)} weights"
    return [
        *_wrapped("model", header.model, whole=True),
        *_wrapped(
            "trained",
            f"{entries} ({share(header.entries, header.weights)}): the trained entries of "
            f"{header.matrices} matrices; all else is frozen",
        ),
        *_wrapped("data", _rows(header)),
        *_wrapped("steps", _steps(header)),
        *_wrapped("memory", _planned(header)),
        *_wrapped("time", "– (told once the first steps are timed)"),
    ]


def _rows(header: Header) -> str:
    if header.rows is None:
        return "a stream"
    parts = [f"{count(header.rows)} rows" if header.rows != 1 else "1 row"]
    if header.tokens is not None:
        parts.append(f"{count(header.tokens)} tokens")
    if header.longest is not None:
        parts.append(f"the longest has {count(header.longest)}")
    return ", ".join(parts)


def _steps(header: Header) -> str:
    effective = header.batch * header.accumulate
    text = f"{header.steps:,}, each of {effective} {'row' if effective == 1 else 'rows'}"
    if header.accumulate > 1:
        text += f" ({header.accumulate} × {header.batch})"
    if header.rows:
        passes = header.epochs
        text += f", {passes:.3g} {'pass' if passes == 1 else 'passes'} over the rows"
    if header.begun:
        text += f"; {header.begun:,} are taken already"
    return text


def _planned(header: Header) -> str:
    if header.planned is None:
        return "not planned"
    if header.room is None:
        return f"{size(header.planned)} planned at the peak"
    return f"{size(header.planned)} planned at the peak, of {size(header.room)} {header.place}"


def first_row_lines(row: FirstRow, marks: bool = True) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The first row as lines of pieces, each piece with whether it is trained; at most six lines.

    Args:
        row: the row.
        marks: whether ⟦ and ⟧ stand around what is trained.

    Returns:
        Lines: what stands before them, and their pieces.
    """
    parts = [(_on_one_line(text), trained) for text, trained in row.parts]
    wide = any(_columns(letter) > 1 for text, _ in parts for letter in text)
    room = (WIDTH - LABEL) * FIRST_ROW_LINES // (2 if wide else 1)
    each = max(24, room // max(1, len(parts)) - 4)
    over = sum(len(text) for text, _ in parts) + 2 * len(parts) > room
    cells = [(_cut(text, each) if over else text, trained) for text, trained in parts[: room // 28]]
    if marks:
        cells = [(f"⟦{text}⟧" if trained else text, trained) for text, trained in cells]
    characters = [(letter, trained) for text, trained in cells for letter in text]
    return [
        ("first row".ljust(LABEL) if not i else " " * LABEL, _pieces(line))
        for i, line in enumerate(_lines(characters, WIDTH - LABEL)[:FIRST_ROW_LINES])
    ]


def _lines(characters: list[tuple[str, bool]], width: int) -> list[list[tuple[str, bool]]]:
    """Lines that end after a space where there is one near their end."""
    lines, start = [], 0
    while start < len(characters):
        stop, taken = start, 0
        while stop < len(characters) and taken + _columns(characters[stop][0]) <= width:
            taken += _columns(characters[stop][0])
            stop += 1
        if stop < len(characters):
            near = [i for i in range(max(start, stop - 20), stop) if characters[i][0] == " "]
            stop = near[-1] + 1 if near else stop
        lines.append(characters[start:stop])
        start = stop
    return lines


def _columns(letter: str) -> int:
    """What a character takes on a terminal."""
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _pieces(characters: list[tuple[str, bool]]) -> list[tuple[str, bool]]:
    """Neighbours of one kind joined."""
    pieces: list[tuple[str, bool]] = []
    for letter, trained in characters:
        if pieces and pieces[-1][1] == trained:
            pieces[-1] = (pieces[-1][0] + letter, trained)
        else:
            pieces.append((letter, trained))
    return pieces


def row_note(row: FirstRow, marked: str) -> str:
    """What the marks mean."""
    text = f"{row.tokens} tokens; trained on {row.trained} of them, {marked}"
    return " " * LABEL + text


def _on_one_line(text: str) -> str:
    """Line ends as a sign, and nothing that could move a terminal's cursor."""
    text = text.replace("\r\n", "\n").replace("\n", "↵").replace("\t", " ")
    return "".join(letter if letter.isprintable() else "�" for letter in text)


def _cut(text: str, most: int) -> str:
    """The start and the end of a text that is too long."""
    if len(text) <= most:
        return text
    half = (most - 3) // 2
    return f"{text[:half]} … {text[-half:]}"


def step_line(step: Step) -> str:
    """A logged step."""
    parts = [f"step {step.step:>{len(str(step.steps))}}/{step.steps}"]
    if step.loss is not None:
        parts.append(f"loss {loss(step.loss):<6}")
    if step.learning_rate is not None:
        parts.append(f"lr {rate(step.learning_rate):<7}")
    if step.tokens_per_second is not None:
        parts.append(f"{count(round(step.tokens_per_second))} tokens/s")
    if step.seconds_left is not None and step.step < step.steps:
        parts.append(f"{duration(step.seconds_left)} left")
    return "   ".join(parts).rstrip()


def rate(learning_rate: float) -> str:
    """A learning rate: "2e-4", "1.83e-5", "0"."""
    if learning_rate == 0:
        return "0"
    digits, exponent = f"{learning_rate:.2e}".split("e")
    digits = digits.rstrip("0").rstrip(".")
    return f"{digits}e{int(exponent)}"


def memory_words(memory: Memory) -> str:
    """Memory now, at most, and as planned."""
    known = (
        (memory.now, "now"),
        (memory.peak, "peak"),
        (memory.planned, "planned"),
    )
    parts = [f"{size(nbytes)} {what}" for nbytes, what in known if nbytes is not None]
    if memory.process is not None:
        parts.append(f"the process holds {size(memory.process)}")
    return ", ".join(parts) or "–"


def refresh_words(refresh: Refresh) -> str:
    """How many entries a refresh has changed."""
    text = f"{share(refresh.churn)} of the trained entries changed at step {refresh.step:,}"
    return text + (f"; next {refresh.following:,}" if refresh.following else "")


def refresh_line(refresh: Refresh) -> str:
    """A refresh, and what became of the entries that it let go."""
    text = f"step {refresh.step}: {share(refresh.churn)} of the trained entries changed"
    if refresh.retired:
        text += f", {count(refresh.retired)} retired (offset kept)"
    return text


def evaluation_line(evaluation: Evaluation) -> str:
    """The evaluation rows at a step."""
    moment = f"after step {evaluation.step:,}" if evaluation.step else "before training"
    took = f", {duration(evaluation.seconds)}" if evaluation.seconds is not None else ""
    return f"evaluation {moment}: loss {loss(evaluation.loss)}{took}"


def summary_lines(summary: Summary) -> list[str]:
    """The end of a run."""
    steps = "1 step" if summary.steps == 1 else f"{summary.steps:,} steps"
    if summary.begun:
        steps += f", the last {summary.steps - summary.begun:,}"
    time = f"{steps} in {duration(summary.in_all)}"
    if summary.tokens and summary.seconds:
        time += f", {count(round(summary.tokens / summary.seconds))} tokens/s"
    lines = [*_wrapped("trained", time)]
    if summary.last_loss is not None:
        lines += _wrapped("loss", f"{loss(summary.first_loss)} → {loss(summary.last_loss)}")
    if summary.after is not None:
        where = f"on {count(summary.eval_rows or 0)} evaluation rows"
        shown = f"{loss(summary.after)} {where}"
        if summary.before is not None:
            shown = f"{loss(summary.before)} → {shown}, before and after training"
        lines += _wrapped("evaluation", shown)
    for i, kept in enumerate(summary.kept):
        lines += _wrapped("kept" if not i else "", kept_words(kept))
    lines += _wrapped("memory", _peak_words(summary.memory))
    if summary.refreshes:
        text = f"{summary.refreshes} in {duration(summary.refresh_seconds)}, the last changed "
        text += f"{share(summary.churn or 0)} of the trained entries"
        lines += _wrapped("refreshes", text)
    for place in summary.places:
        held = f" ({size(place.nbytes)})" if place.nbytes is not None else ""
        lines += _wrapped(place.what, f"{place.path}{held}", whole=True)
    for i, command in enumerate(summary.commands):
        lines += _wrapped("next" if not i else "", command, whole=True)
    return lines


def _peak_words(memory: Memory) -> str:
    if memory.peak is None:
        return "not measured"
    if memory.planned is None:
        return f"{size(memory.peak)} of tensors at the peak of training"
    return f"{size(memory.peak)} of tensors at the peak of training, {size(memory.planned)} planned"


def stopped_lines(step: int, steps: int, checkpoint: str | None, command: str | None) -> list[str]:
    """A run that was stopped early, and how it goes on."""
    lines = [f"stopped after step {step:,} of {steps:,}"]
    lines[0] += f"; everything is saved in {checkpoint}." if checkpoint else "; nothing is saved."
    if checkpoint and command:
        lines += ["Go on with:", f"  {command}"]
    return lines


def _wrapped(label: str, text: str, whole: bool = False) -> list[str]:
    """A fact behind its label; what is copied, as commands and paths are, stays whole."""
    if whole:
        return [f"{label:<{LABEL}}{text}".rstrip()]
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False)
    return [f"{label if not i else '':<{LABEL}}{line}" for i, line in enumerate(lines or [""])]


def shell(*words: str | Path) -> str:
    """A command as it is typed."""
    return shlex.join(str(word) for word in words)
