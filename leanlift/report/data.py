"""What a run has left, read within bounds: memory, training curve, settings, adapter, answers.

Each part is a file of its own, which may be missing or damaged: a report shows what there is, and
says in a sentence what it does not have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from leanlift.errors import UserError
from leanlift.io.bounded import MOST_OF_A_STRANGER, parse_bounded, read_bounded
from leanlift.io.files import read_json
from leanlift.io.measured import REPORT_NAME, KeptLoss, is_line, kept_in, load_report
from leanlift.io.places import (
    CONFIG_NAME,
    PREDICTIONS_NAME,
    RUN_NAME,
    STATE_NAME,
    checkpoints_in,
    look_at,
)
from leanlift.report.adapter import AdapterFacts, read_adapter
from leanlift.settings import todays_names

Points = list[tuple[float, float]]
"""(step, value) in the order in which they were logged."""

LEFT_OUT = "Left out: "
MOST_SAMPLES = 200
LONGEST_TEXT = 2000
"""Characters of a sample's text that are kept."""


@dataclass(frozen=True)
class RefreshFacts:
    """One refresh: at which step, the share of entries replaced, entries retired since the start,
    newcomers for which there was no room."""

    step: int
    churn: float
    retired: int
    held_back: int


@dataclass(frozen=True)
class Curve:
    """What Trainer has logged; every list may be empty."""

    loss: Points = field(default_factory=list)
    eval_loss: Points = field(default_factory=list)
    learning_rate: Points = field(default_factory=list)
    refreshes: list[RefreshFacts] = field(default_factory=list)
    steps: int = 0
    seconds: float | None = None


@dataclass(frozen=True)
class Answers:
    """One row with the answers of models by name, and whether each was right (None: not judged)."""

    prompt: str
    expected: str
    answers: dict[str, str]
    right: dict[str, bool | None]


@dataclass(frozen=True)
class Run:
    """A run's directory.

    Attributes:
        directory: where it is.
        memory: `memory.json`, checked; None where there is none.
        curve: of `trainer_state.json`.
        settings: short plain values of `run.json`.
        adapter: None where there is none in leanlift's own form.
        answers: of `predictions.jsonl`.
        kept: of `run.json`: rows that were to be kept.
        missing: a sentence for each part that is not there or cannot be read.
    """

    directory: Path
    memory: dict[str, Any] | None
    curve: Curve | None
    settings: dict[str, str]
    adapter: AdapterFacts | None
    answers: list[Answers]
    missing: list[str]
    kept: list[KeptLoss] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Its directory's, with the one above where that says more."""
        whole = self.directory.resolve()
        if whole.name == "run" or whole.name.startswith("checkpoint-"):
            return f"{whole.parent.name}/{whole.name}"
        return whole.name or str(self.directory)


def read_run(run: str | Path, offsets: bool = True) -> Run:
    """All that a run's directory, a checkpoint's or an adapter's has to say.

    Args:
        run: the directory.
        offsets: whether to read the adapter's tensors too, as `read_adapter` has it.

    Raises:
        UserError: nothing at all, or another kind of place.
    """
    directory = Path(run).expanduser()
    names = (REPORT_NAME, STATE_NAME, CONFIG_NAME)
    missing: list[str] = []
    steps = checkpoints_in(directory) if directory.is_dir() else []
    newest = directory / f"checkpoint-{steps[-1]}" if steps else directory
    ended = any((directory / name).is_file() for name in names)
    if not ended and any((newest / name).is_file() for name in names):
        directory = newest
        missing.append(f"The run has not ended: this is its newest checkpoint, {directory.name}.")
    if not directory.is_dir() or not any((directory / name).is_file() for name in names):
        raise UserError(
            f"{run} holds no {REPORT_NAME}, no {STATE_NAME} and no adapter: it is "
            f"{look_at(directory).words}. Expected the output_dir of a training run."
        )

    def part(name: str, read: Callable[[], Any], lacking: str) -> Any:
        if not (directory / name).is_file():
            if lacking:
                missing.append(lacking)
            return None
        try:
            return read()
        except UserError as error:
            missing.append(f"{LEFT_OUT}{error}")
            return None

    memory = part(REPORT_NAME, lambda: load_report(directory), "No memory was measured here.")
    curve = part(STATE_NAME, lambda: _curve(directory), "No training curve was kept here.")
    noted = part(RUN_NAME, lambda: _noted(directory), "No settings were kept here.")
    adapter = part(CONFIG_NAME, lambda: _adapter(directory, offsets), "There is no adapter here.")
    answers = part(PREDICTIONS_NAME, lambda: _answers(directory), "")
    if memory is None and curve is None and adapter is None:
        why = next(text for text in missing if text.startswith(LEFT_OUT))
        raise UserError(f"nothing in {run} can be shown: {why.removeprefix(LEFT_OUT)}")
    settings = _settings(noted or {}, str(directory / RUN_NAME))
    kept = kept_in(noted)
    return Run(directory, memory, curve, settings, adapter, answers or [], missing, kept)


def _adapter(directory: Path, offsets: bool) -> AdapterFacts:
    try:
        return read_adapter(directory, offsets)
    except MemoryError:  # a matrix at a time; still, a file can be larger than a machine
        raise UserError(f"the adapter in {directory} does not fit this machine's memory.") from None


def _noted(directory: Path) -> dict[str, Any]:
    data = read_json(directory / RUN_NAME, MOST_OF_A_STRANGER)
    if not isinstance(data, dict):
        raise UserError(f"{directory / RUN_NAME} is not the settings of a run.")
    _settings(data, str(directory / RUN_NAME))
    return data


def _settings(data: dict[str, Any], where: str) -> dict[str, str]:
    """Settings as text, in the order of the file; whatever is no short plain value is left out."""
    known = todays_names(dict(list(data.items())[:200]), where)
    shown = {str(key): _as_text(value) for key, value in known.items()}
    return {key: text for key, text in shown.items() if text and is_line(key) and is_line(text)}


def _as_text(value: Any) -> str:
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return ", ".join(map(str, value))[:200]
    if value is None or isinstance(value, (dict, list)):
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)[:200]


# --- the training curve ---------------------------------------------------------------------


def _curve(directory: Path) -> Curve:
    path = directory / STATE_NAME
    data = read_json(path)
    logs = data.get("log_history") if isinstance(data, dict) else None
    if not isinstance(logs, list):
        raise UserError(f"{path} is not the state of a training run.")
    curve, last = Curve(), data.get("global_step")
    for log in logs:
        if not isinstance(log, dict) or not _is_step(log.get("step")):
            continue
        step = log["step"]
        for key, points in (
            ("loss", curve.loss),
            ("eval_loss", curve.eval_loss),
            ("learning_rate", curve.learning_rate),
        ):
            if _is_number(log.get(key)):
                points.append((step, float(log[key])))
        if _is_number(log.get("refresh_churn")):
            churn = min(1.0, max(0.0, float(log["refresh_churn"])))
            counts = [_step_or_0(log.get(f"refresh_{key}")) for key in ("retired", "held_back")]
            curve.refreshes.append(RefreshFacts(step, churn, *counts))
    times = [log.get("train_runtime") for log in logs if isinstance(log, dict)]
    known = [float(time) for time in times if _is_number(time)]  # type: ignore[arg-type]
    return replace(curve, steps=_step_or_0(last), seconds=known[-1] if known else None)


def _step_or_0(value: Any) -> int:
    return int(value) if _is_step(value) else 0


def _is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**50


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 1e30


# --- answers --------------------------------------------------------------------------------


def _answers(directory: Path) -> list[Answers]:
    """The first rows of a file of answers; a line that is none ends in a sentence."""
    path = directory / PREDICTIONS_NAME
    found = []
    try:
        lines = read_bounded(path).splitlines()
        for number, line in enumerate(lines[:MOST_SAMPLES]):
            row = parse_bounded(line)
            if not _is_answer(row):
                raise ValueError(f"line {number + 1} is no row of answers")
            answers = {name[:40]: text[:LONGEST_TEXT] for name, text in row["answers"].items()}
            right = row["right"] if isinstance(row.get("right"), dict) else {}
            judged = {name: right.get(name) for name in answers}
            found.append(
                Answers(
                    row["prompt"][-LONGEST_TEXT:],
                    row["expected"][:LONGEST_TEXT],
                    answers,
                    {name: v if isinstance(v, bool) else None for name, v in judged.items()},
                )
            )
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}).") from None
    return found


def _is_answer(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in ("prompt", "expected"))
        and isinstance(row.get("answers"), dict)
        and 0 < len(row["answers"]) <= 8
        and all(isinstance(text, str) for text in row["answers"].values())
    )
