"""The suites of `benchmarks/quality/paper`, cut down to a model of two blocks and a few rows."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.quality.paper import SUITES, Given, paper
from benchmarks.quality.paper.lift import Lift
from benchmarks.quality.paper.peers import Full, Lora
from benchmarks.quality.paper.suites import QV, Setting

STEPS, SAVED = 16, 6
MASK = {"rank_budget": 2, "approx_rank": 2, "target_modules": QV}
METHODS = {
    "principal-nf4": Lift("nf4", {**MASK, "refresh_interval": 5}, {"learning_rate": 1e-2}),
    "principal-16bit": Lift("16bit", {"density": 0.05, "approx_rank": 2}),
    "qlora-nf4": Lora("nf4", QV, rank=2, alpha=4, autocast=False),
    "full-16bit": Full({"learning_rate": 1e-3}),
}
TINY = {"max_steps": STEPS, "save_steps": SAVED, "max_length": 128, "logging_steps": 8}
PEFTS = replace(
    SUITES["metamath"], methods=METHODS, new_tokens=3, loop={**SUITES["metamath"].loop, **TINY}
)
PAPERS = replace(
    SUITES["math"],
    settings={"2-7b": Setting(1e-3, 2, 2, 5)},
    new_tokens=3,
    batch=4,
    loop={
        "num_train_epochs": 1,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
    },
)


def places(root: Path, base: Path, **more: Any) -> Given:
    """All that a user gives, made in a directory."""
    tests = root / "tests"
    tests.mkdir(parents=True)
    rows = [
        {"query": f"{i}+1?" + "x" * (i % 7), "response": f"The answer is: {i + 1}"}
        for i in range(100)
    ]
    (root / "rows.json").write_text(json.dumps(rows))
    asked = [{"question": f"{i}+1?", "answer": f"So.\n#### {i + 1}"} for i in range(6)]
    (tests / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    (root / "text.txt").write_text("One passage.\n***\nAnother one.\n")
    return Given(
        str(base), root / "rows.json", tests, root / "runs", root / "text.txt",
        results=root / "results", **more,
    )  # fmt: skip


def alpaca_places(root: Path, base: Path, **more: Any) -> Given:
    """The same for the paper's suites: two of the seven test sets."""
    given = places(root, base, **more)
    rows = [
        {"instruction": f"{i}+1?", "input": "", "output": f"{i + 1}", "answer": f"{i + 1}"}
        for i in range(16)
    ]
    for file in (given.data, given.tests / "gsm8k.json", given.tests / "svamp.json"):
        file.write_text(json.dumps(rows))
    return replace(given, base="2-7b")


if __name__ == "__main__":  # a run in a process of its own, to be killed: root, base, method
    root, base, method = sys.argv[1:]
    given = Given(
        base, Path(root, "rows.json"), Path(root, "tests"), Path(root, "runs"),
        Path(root, "text.txt"), (method,), results=Path(root, "results"),
    )  # fmt: skip
    paper(PEFTS, given)
