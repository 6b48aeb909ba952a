"""`keep_dataset_name`: the loss of base and adapter on rows that training does not teach."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from command import complaint
from datasets import Dataset
from processes import ROOT, free_port
from safetensors.torch import load_file
from tiny import load, make_checkpoint, make_tokenizer

from leanlift import load_adapter
from leanlift.cli import main
from leanlift.data.dataset import load_rows
from leanlift.evaluation.answers import losses_of
from leanlift.evaluation.evaluate import to_samples
from leanlift.model import freeze_quantized, scale_adapter
from leanlift.paired import change
from leanlift.plan import Batch, largest_batch
from leanlift.report.data import read_run
from leanlift.report.page import page
from leanlift.report.text import report_text
from leanlift.training import LiftSFTConfig, RunArguments, kept
from leanlift.training.batches import Batches
from leanlift.training.plan import plan_settings

pytestmark = pytest.mark.usefixtures("unplanned")

PROSE = "It was the best of times, it was the worst of times. " * 5
KEPT = ("prose.txt", "other.jsonl")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with dropout: who measures while it is on, or draws from its numbers, is seen."""
    place = make_checkpoint(tmp_path_factory.mktemp("dropout") / "base")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.2}))
    return place


def filled(place: Path) -> Path:
    """A directory with rows to train on and others to keep."""
    rows = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(24)]
    other = [{"prompt": f"say {word}: ", "completion": word} for word in ("yes", "no", "perhaps")]
    for name, made in (("rows", rows), ("other", other)):
        (place / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    (place / "prose.txt").write_text(PROSE)
    return place


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Such a directory to work in."""
    monkeypatch.chdir(tmp_path)
    return filled(tmp_path)


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs that differ in what they measure alone: `with` and `without`; the screen of the
    first as `with.txt`."""
    place = filled(tmp_path_factory.mktemp("kept"))
    with pytest.MonkeyPatch.context() as patch, (place / "with.txt").open("w") as screen:
        patch.chdir(place)
        patch.setattr("leanlift.cli.train._plan", lambda *given: None)
        patch.setattr("leanlift.measure.report.draw", lambda *given: None)
        with redirect_stdout(screen):
            more = ("--keep_dataset_name", *KEPT, "--merged_dir", "merged")
            assert main(words(base, "with", *more)) == 0
        assert main(words(base, "without")) == 0
    return place


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


def oracle_of_base(base: Path, name: str = "prose.txt") -> tuple[list[float], list[int]]:
    model = load(base)
    freeze_quantized(model)
    return oracle(model, name)


def test_it_is_what_eval_measures_of_the_base_and_of_the_adapter(
    base: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(done)
    said, found = (done / "with.txt").read_text(), noted("with")
    assert [each["name"] for each in found] == list(KEPT)
    model = load_adapter(load(base), "with")
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


def test_a_run_is_the_same_with_and_without(done: Path) -> None:
    place = done
    one, two = (load_file(place / run / "adapter_model.safetensors") for run in ("with", "without"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    states = [json.loads((place / run / "trainer_state.json").read_text()) for run in
              ("with", "without")]  # fmt: skip
    losses = [[log.get("loss") for log in state["log_history"]] for state in states]
    assert losses[0] == losses[1]
    assert "kept" not in json.loads((place / "without" / "run.json").read_text())


# --- a run that is gone on with ---------------------------------------------------------------


def test_one_that_is_gone_on_with_still_compares_with_the_base(
    base: Path, done: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what its checkpoint has; of rows that are others by now, with the adapter turned off."""
    shutil.copytree(done / "with" / "checkpoint-2", place / "again" / "checkpoint-2")
    (place / "other.jsonl").write_text('{"text": "A tale of two cities."}\n' * 3)
    measured, real = [], kept.losses_of

    def seen(trainer: Any, parts: Any, say: Any) -> Any:
        measured.append([part.name for part in parts])
        return real(trainer, parts, say)

    monkeypatch.setattr(kept, "losses_of", seen)
    more = ("--resume_from_checkpoint", "true", "--keep_dataset_name", *KEPT)
    assert main(words(base, "again", *more)) == 0
    assert measured == [["other.jsonl"], list(KEPT)]
    prose, other = noted("again")
    assert prose == noted(str(done / "with"))[0]
    before, tokens = oracle_of_base(base, "other.jsonl")
    assert math.isclose(other["before"], sum(before) / sum(tokens), rel_tol=1e-5)
    assert other["change"] != 0


@pytest.mark.thorough
def test_one_that_did_not_measure_measures_the_base_when_it_goes_on(
    base: Path, done: Path, place: Path
) -> None:
    shutil.copytree(done / "without" / "checkpoint-2", place / "again" / "checkpoint-2")
    more = ("--resume_from_checkpoint", "true", "--keep_dataset_name", *KEPT)
    assert main(words(base, "again", *more)) == 0
    assert noted("again") == noted(str(done / "with"))
    one, two = (
        load_file(run / "adapter_model.safetensors") for run in (done / "without", place / "again")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)


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


def test_losses_that_are_not_finite_are_in_no_checkpoint() -> None:
    held = kept.KeptLosses()
    held.before = {"a": {**GOOD, "losses": [1.0, math.nan]}, "b": GOOD}
    assert held.state()["attributes"] == {"before": {"b": GOOD}}


# --- where it is told -------------------------------------------------------------------------


def test_the_report_and_the_card_tell_it(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = read_run(done / "with")
    first, second = run.kept
    text = report_text(run)
    assert f"kept              {first.name}: " in text
    assert f"                  {second.name}: " in text
    shown = page(run)
    assert "What was kept" in shown
    assert "Change of what was kept" in shown
    assert "loss on prose.txt: " in (done / "merged" / "README.md").read_text()
    both = [str(done / name) for name in ("with", "without")]
    assert main(["report", *both]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if "s, prose.txt" in x)
    assert line.endswith("–")
    assert main(["report", *both, "--json"]) == 0
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


# --- what it takes ----------------------------------------------------------------------------


def test_rows_that_are_kept_count_in_the_plan_one_at_a_time() -> None:
    def rows(*lengths: int) -> kept.KeptRows:
        ids = [[5] * length for length in lengths]
        return kept.KeptRows("a", Dataset.from_dict({"input_ids": ids, "labels": ids}))

    train, large, small = Batch(4, 99), Batch(8, 99), Batch(1, 9, 8)
    with_kept = kept.with_kept
    assert with_kept(Batches(train), [], evaluates=False) == Batches(train)
    longest = Batch(1, 40, 39)
    both = [rows(7, 40), rows(3)]
    assert with_kept(Batches(train), both, evaluates=False) == Batches(train, longest)
    assert with_kept(Batches(train, small), both, evaluates=True) == Batches(train, longest)
    assert with_kept(Batches(train, large), both, evaluates=True) == Batches(train, large)
    assert with_kept(Batches(train), both, evaluates=True) == Batches(train), "not known: more"


def test_a_plan_counts_a_row_of_max_length_where_nothing_is_read(tmp_path: Path) -> None:
    sft = LiftSFTConfig(
        str(tmp_path), use_cpu=True, max_length=77, per_device_eval_batch_size=16
    )  # fmt: skip
    for more, expected in (
        ({}, None),
        ({"keep_dataset_name": "prose.txt"}, largest_batch(1, 77)),
        ({"eval_dataset_name": "a.jsonl"}, largest_batch(16, 77)),
        ({"eval_dataset_name": "a.jsonl", "keep_dataset_name": "b.txt"}, largest_batch(16, 77)),
    ):
        args = RunArguments("base", "rows.jsonl", **more)  # type: ignore[arg-type]
        assert plan_settings(args, sft, False, Batches()).eval_batch == expected


@pytest.mark.thorough
def test_another_loss_that_is_trained_on_is_not_measured(base: Path, place: Path) -> None:
    found = []
    for output, kind in (("plain", "nll"), ("another", "dft")):
        command = words(base, output, "--keep_dataset_name", "prose.txt", "--loss_type", kind)
        assert main([*command, "--max_steps", "1"]) == 0
        found.append(noted(output)[0]["before"])
    assert found[0] == found[1]
