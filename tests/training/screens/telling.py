"""The facts of one run, told to a screen."""

from __future__ import annotations

from typing import Any

from leanlift.io.measured import KeptLoss
from leanlift.training.screens import (
    Evaluation,
    FirstRow,
    Header,
    Memory,
    Place,
    Refresh,
    Screen,
    Step,
    Summary,
)

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
    kept=(
        KeptLoss("prose.txt", 120, 122_000, 2.3142, 2.3495, 0.0353, 0.0041),
        KeptLoss("code.txt", 64, 64_300, 1.2042, 1.1991, -0.0051, 0.0062),
    ),
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
