"""`keep_dataset_name`: the loss of base and adapter on rows that training does not teach."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command import complaint
from processes import ROOT, free_port
from safetensors.torch import load_file
from sweeps import swept
from tiny import load, make_tokenizer

from leanlift import load_adapter
from leanlift.cli import main
from leanlift.data.dataset import load_rows
from leanlift.evaluation.answers import losses_of
from leanlift.evaluation.evaluate import to_samples
from leanlift.model import freeze_quantized, scale_adapter
from leanlift.paired import change
from leanlift.report.data import read_run
from leanlift.report.page import page
from leanlift.report.text import report_text
from leanlift.training import kept
from leanlift.training.checkpointing.settings import FREE

pytestmark = pytest.mark.usefixtures("unplanned")

PROSE = "It was the best of times, it was the worst of times. " * 5
KEPT = ("prose.txt", "other.jsonl")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with rows to train on and others to keep."""
    rows = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(24)]
    other = [{"prompt": f"say {word}: ", "completion": word} for word in ("yes", "no", "perhaps")]
    for name, made in (("rows", rows), ("other", other)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "prose.txt").write_text(PROSE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words(base: Path, output: str, *more: str) -> list[str]:
    return [
        "train", "--model_name_or_path", str(base), "--dataset_name", "rows.jsonl",
        "--output_dir", output, "--max_steps", "4", "--refresh_interval", "2", "--approx_rank",
        "4", "--use_cpu", "true", "--save_steps", "2", "--per_device_train_batch_size", "4",
        "--gradient_accumulation_steps", "1", "--max_length", "48", "--log_format", "plain",
        "--learning_rate", "1e-2", *more,
    ]  # fmt: skip


def noted(run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(Path(run, "run.json").read_text())["kept"]
    return found


def oracle(model: Any, name: str) -> tuple[list[float], list[int]]:
    """Sums and tokens of each row, as `leanlift eval` has them."""
    samples = to_samples(load_rows(name), make_tokenizer(), window=48)
    return losses_of(model.eval(), samples, 1), [sample.trained for sample in samples]


def oracle_of_base(base: Path) -> tuple[list[float], list[int]]:
    model = load(base)
    freeze_quantized(model)
    return oracle(model, "prose.txt")


def test_it_is_what_eval_measures_of_the_base_and_of_the_adapter(
    base: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(base, "run", "--keep_dataset_name", *KEPT)) == 0
    said, found = capsys.readouterr().out, noted("run")
    assert [each["name"] for each in found] == list(KEPT)
    model = load_adapter(load(base), "run")
    first = [oracle(scale_adapter(model, 0.0), name) for name in KEPT]
    scale_adapter(model, 1.0)
    for each, (before, tokens) in zip(found, first, strict=True):
        after, _ = oracle(model, each["name"])
        differs = change(before, after, tokens)
        assert differs is not None
        assert (each["rows"], each["tokens"]) == (len(tokens), sum(tokens))
        assert math.isclose(each["before"], sum(before) / sum(tokens), rel_tol=1e-5)
        assert math.isclose(each["after"], sum(after) / sum(tokens), rel_tol=1e-5)
        assert each["change"] == pytest.approx(differs.mean, rel=0.01)
        assert each["error"] == pytest.approx(differs.error, rel=0.01)
        assert abs(each["change"]) > 0.001
    assert said.count("Measuring what is kept …") == 2
    kept_line = next(line for line in said.splitlines() if line.startswith("kept "))
    assert kept_line.split()[1:6:2] == ["prose.txt:", "before,", "after"]
    assert " ± " in kept_line


def test_a_run_is_the_same_with_and_without(base: Path, place: Path) -> None:
    assert main(words(base, "with", "--keep_dataset_name", *KEPT)) == 0
    assert main(words(base, "without")) == 0
    one, two = (load_file(place / run / "adapter_model.safetensors") for run in ("with", "without"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    states = [json.loads((place / run / "trainer_state.json").read_text()) for run in
              ("with", "without")]  # fmt: skip
    losses = [[log.get("loss") for log in state["log_history"]] for state in states]
    assert losses[0] == losses[1]
    assert "kept" not in json.loads((place / "without" / "run.json").read_text())


# --- a run that is gone on with ---------------------------------------------------------------


def other_text(place: Path) -> None:
    (place / "prose.txt").write_text("A tale of two cities, and of other places. " * 5)


@pytest.mark.parametrize("change_of_rows", swept([None, other_text], None))
def test_one_that_is_gone_on_with_still_compares_with_the_base(
    base: Path, place: Path, change_of_rows: Callable[[Path], None] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = ("--keep_dataset_name", "prose.txt")
    assert main(words(base, "run", *more)) == 0
    shutil.copytree(place / "run" / "checkpoint-2", place / "again" / "checkpoint-2")
    measured, real = [], kept.losses_of
    monkeypatch.setattr(
        kept, "losses_of", lambda *given: measured.append(1) or real(*given)
    )  # fmt: skip
    if change_of_rows is not None:
        change_of_rows(place)
    assert main(words(base, "again", "--resume_from_checkpoint", "true", *more)) == 0
    before, tokens = oracle_of_base(base)
    (again,) = noted("again")
    assert math.isclose(again["before"], sum(before) / sum(tokens), rel_tol=1e-5)
    assert len(measured) == (1 if change_of_rows is None else 2)
    if change_of_rows is None:
        assert again == noted("run")[0]


def test_one_that_did_not_measure_measures_the_base_when_it_goes_on(
    base: Path, place: Path
) -> None:
    assert main(words(base, "run")) == 0
    shutil.copytree(place / "run" / "checkpoint-2", place / "again" / "checkpoint-2")
    more = ("--resume_from_checkpoint", "true", "--keep_dataset_name", "prose.txt")
    assert main(words(base, "again", *more)) == 0
    before, tokens = oracle_of_base(base)
    assert math.isclose(noted("again")[0]["before"], sum(before) / sum(tokens), rel_tol=1e-5)
    one, two = (load_file(place / run / "adapter_model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert "keep_dataset_name" in FREE


GOOD = {"digest": "d", "losses": [1.0, 2]}


@pytest.mark.parametrize(
    "saved",
    [None, [], {}, {"digest": "other", "losses": [1.0, 2]}, {"digest": "d"},
     *({"digest": "d", "losses": losses} for losses in
       ([1.0], [1.0, None], [1.0, math.nan], [1.0, math.inf], [1.0, True], "12"))],
    ids=str,
)  # fmt: skip
def test_what_a_checkpoint_says_of_other_rows_or_of_nothing_is_not_taken(saved: Any) -> None:
    rows = kept.KeptRows("a", [0, 0])  # type: ignore[arg-type] - only counted
    assert kept._is_of(GOOD, rows, "d")
    assert not kept._is_of(saved, rows, "d")


# --- where it is told -------------------------------------------------------------------------


def test_the_report_and_the_card_tell_it(
    base: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = ("--merged_dir", "merged")
    assert main(words(base, "run", "--keep_dataset_name", *KEPT, *merged)) == 0
    run = read_run("run")
    first, second = run.kept
    text = report_text(run)
    assert f"kept              {first.name}: " in text
    assert f"                  {second.name}: " in text
    shown = page(run)
    assert "What was kept" in shown
    assert "Change of what was kept" in shown
    assert "loss on prose.txt: " in (place / "merged" / "README.md").read_text()
    assert main(words(base, "plain")) == 0
    capsys.readouterr()
    assert main(["report", "run", "plain"]) == 0
    said = capsys.readouterr().out
    assert "change of loss, prose.t" not in said or "–" in said
    assert main(["report", "run", "plain", "--json"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    assert results["change of loss, prose.txt"] == [first.change, None]


# --- what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["none.txt"], "none.txt does not exist"),
        (["empty.txt"], "empty.txt holds no rows"),
        (["bad.jsonl"], "keep (bad.jsonl) dataset has the columns ['a']"),
        (["late.jsonl"], "of the keep (late.jsonl) dataset"),
        (["prose.txt", "prose.txt"], "has prose.txt twice"),
        (['{"path": "prose.txt", "fraction": 0.5}'], "leave fraction out"),
        (['{"paths": "prose.txt"}'], "entry 0 of keep_dataset_name has an unknown key"),
        (['{"path": "other.jsonl", "split": "train[5:]"}'], "leaves none of the 3 rows"),
    ],
    ids=lambda case: case[0] if isinstance(case, list) else "",
)
def test_what_is_wrong_is_said_before_the_base_is_loaded(
    base: Path, place: Path, given: list[str], said: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(
        import_module("leanlift.training.run"), "load_model", lambda *a, **k: pytest.fail("loaded")
    )
    (place / "empty.txt").write_text("\n")
    (place / "bad.jsonl").write_text('{"a": 1}\n')
    late = [{"text": "abc"}] * 30 + [{"text": 5}]
    (place / "late.jsonl").write_text("\n".join(map(json.dumps, late)))
    assert said in complaint(capsys, *words(base, "run", "--keep_dataset_name", *given))
    assert not (place / "run").exists()


def test_a_dry_run_reads_it(base: Path, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(base, "run", "--keep_dataset_name", *KEPT, "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "Kept    the loss on prose.txt: 6 rows is measured" in said
    assert not (place / "run").exists()


@pytest.mark.thorough
def test_two_processes_measure_what_one_does(base: Path, place: Path) -> None:
    """Seven rows and one: a part of theirs each, and nobody waits for the other's."""
    (place / "prose.txt").write_text(PROSE + PROSE[:30])
    (place / "one.txt").write_text("a text")
    kept_files = ("--keep_dataset_name", "prose.txt", "one.txt", "--bf16", "false", "--dtype")
    command = words(base, "run", *kept_files, "float32", "--per_device_train_batch_size", "2")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2",
         "--master_port", str(free_port()), "-m", "leanlift", *command],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False, cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("prose.txt: ") == 1  # one speaks for both
    first, second = noted("run")
    before, tokens = oracle_of_base(base)
    model = load_adapter(load(base), "run")
    after, _ = oracle(model, "prose.txt")
    assert (first["rows"], second["rows"]) == (len(tokens), 1) == (7, 1)
    assert second["error"] is None
    assert math.isclose(first["before"], sum(before) / sum(tokens), rel_tol=1e-5)
    assert math.isclose(first["after"], sum(after) / sum(tokens), rel_tol=1e-5)
