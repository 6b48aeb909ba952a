"""The runs for whoever has a GPU, on a tiny model: everything but the figures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import ENVIRONMENT, ROOT
from safetensors.torch import load_file
from sweeps import swept
from tiny import make_checkpoint
from transformers import Trainer

pytest.importorskip("peft")

from paper_suites import METHODS, PAPERS, PEFTS, SAVED, STEPS, alpaca_places, places

from benchmarks.quality.paper import Given, paper, stages
from benchmarks.quality.paper.peers import in_a_sentence, last_peer_checkpoint
from benchmarks.quality.paper.rows import in_their_order
from benchmarks.quality.paper.suites import Suite
from benchmarks.quality.paper.table import read
from leanlift import UserError
from leanlift.data.tokenizer import load_tokenizer
from leanlift.errors import OutOfMemoryError
from leanlift.training import last_whole_checkpoint


class Killed(BaseException):
    """In the place of SIGKILL: nothing catches it."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("paper") / "Tiny")


def kill_at(monkeypatch: pytest.MonkeyPatch, step: int) -> list[list[int]]:
    """The process dies in this step; the rows before are kept, without their padding."""
    real: Any = Trainer.training_step
    seen: list[list[int]] = []

    def training_step(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            raise Killed
        pairs = zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        seen.extend(ids[mask.bool()].tolist() for ids, mask in pairs)
        return real(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", training_step)
    return seen


def tokens_of(given: Given) -> list[list[int]]:
    """What PEFT's order of the rows is, each with its end token."""
    tokenizer = load_tokenizer(given.model)
    texts = in_their_order(given.data, tokenizer, STEPS, PEFTS.batch)
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]


def trained(given: Given, suite: Suite, method: str) -> dict[str, Any]:
    """The tensors that a training has left."""
    where = given.output / suite.name / "tiny" / method / "run"
    return dict(load_file(next(where.glob("*model.safetensors"))))


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@pytest.mark.parametrize("method", swept(METHODS, "principal-nf4"))
def test_a_killed_run_goes_on_and_nothing_is_done_twice(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    given = places(tmp_path, base, methods=(method,), limit=4)
    lines: list[str] = []
    with monkeypatch.context() as patch:
        seen = kill_at(patch, 9)
        with pytest.raises(Killed):
            paper(PEFTS, given, lines.append)
    assert not any(f"step {STEPS} of" in line for line in lines)
    assert seen == tokens_of(given)[: len(seen)] != []
    begun = len(lines)
    (row,) = paper(PEFTS, given, lines.append)
    steps = [line for line in lines[begun:] if "step " in line]
    assert f"step {SAVED + 1} of" in steps[0]
    whole = replace(given, output=tmp_path / "whole")
    paper(PEFTS, whole, [].append)
    assert same(trained(given, PEFTS, method), trained(whole, PEFTS, method))
    held = {tensor.dtype for tensor in trained(given, PEFTS, method).values()}
    assert {dtype for dtype in held if dtype.is_floating_point} == {torch.float32}
    assert row["steps"] == STEPS
    assert row["tokens_per_second"] > 0
    assert row["peak_bytes"] > 0
    assert row["forgetting"] == row["loss_after"] - row["loss_before"] != 0
    assert 0 <= row["gsm8k"] == row["mean"] <= 1
    assert not list(given.output.rglob("checkpoint-*"))
    (stored,) = read(given.results / "quality_paper_tiny.csv")
    assert {"method": method, "model": "tiny", "limit": "4", "torch": row["torch"]}.items() <= (
        stored.items()
    )
    with monkeypatch.context() as patch:
        patch.setattr(stages, "load_base", None)
        patch.setattr(type(METHODS[method]), "load", None)
        said: list[str] = []
        assert paper(PEFTS, given, said.append) == [row]  # no model is loaded any more
        assert len(said) == 1  # nothing costs anything any more
        with pytest.raises(UserError, match=r"begun with learning_rate = .*choose another --out"):
            paper(PEFTS, replace(given, loop={"learning_rate": 0.5}), [].append)
    (row,) = paper(PEFTS, replace(given, limit=None), [].append)  # answers alone are asked again
    assert row["limit"] == ""
    assert len(read(given.results / "quality_paper_tiny.csv")) == 2


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["principal-nf4", "full-16bit"])
def test_a_process_that_is_killed_leaves_what_can_be_gone_on_with(
    base: Path, tmp_path: Path, method: str
) -> None:
    given = places(tmp_path, base, methods=(method,))
    command = [sys.executable, str(ROOT / "tests" / "paper_suites.py")]
    run = given.output / PEFTS.name / "tiny" / method / "run"
    with subprocess.Popen(
        [*command, str(tmp_path), str(base), method],
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as process:  # fmt: skip
        while process.poll() is None and not list(run.glob("checkpoint-*/trainer_state.json")):
            time.sleep(0.005)
        assert process.poll() is None, "it came to its end before it could be killed"
        process.send_signal(signal.SIGKILL)
    paper(PEFTS, given, [].append)
    whole = replace(given, output=tmp_path / "whole")
    paper(PEFTS, whole, [].append)
    assert same(trained(given, PEFTS, method), trained(whole, PEFTS, method))


@pytest.mark.thorough
def test_the_papers_suites(base: Path, tmp_path: Path) -> None:
    names = ("principal-nf4", "random-nf4", "qlora-nf4", "lora-16bit", "full-16bit")
    lines: list[str] = []
    rows = paper(PAPERS, alpaca_places(tmp_path, base, methods=names, limit=3), lines.append)
    assert [row["method"] for row in rows] == list(names)
    assert all(row["mean"] == (row["gsm8k"] + row["svamp"]) / 2 for row in rows)
    assert [row["trained"] for row in rows[:1]] * 3 == [row["trained"] for row in rows[1:4]]
    assert rows[0]["steps"] == 4
    assert "| method | gsm8k | svamp | mean | forgetting |" in lines[-1]
    assert "published" not in lines[-1]


def given_less(given: Given) -> Iterator[tuple[Given, str]]:
    """Something is missing, and what is said of it."""
    nowhere = Path("nowhere")
    yield replace(given, model="org/name"), "--model org/name"
    yield replace(given, data=nowhere), "--data nowhere"
    yield replace(given, tests=nowhere), "--tests nowhere (a directory with gsm8k"
    yield replace(given, text=None), "FineWiki"
    yield replace(given, text=nowhere), "--text nowhere"
    yield replace(given, methods=("lora-16bit",)), "has no method lora-16bit"
    yield replace(given, limit=0), "--limit of at least 1"
    both = replace(given, data=nowhere, text=None)
    yield both, "not there: --data nowhere (a file of rows); --text"


def test_what_is_missing_is_said_at_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.quality.paper.run._look", None)  # nothing is read before
    for given, words in given_less(places(tmp_path, base)):
        with pytest.raises(UserError) as caught:
            paper(PEFTS, given, [].append)
        assert words in str(caught.value)
    assert not (tmp_path / "runs").exists()


def bad_files(given: Given) -> Iterator[tuple[Path, Any, str]]:
    """A file, what is in it instead, and what is said of it."""
    yield given.data, [{"a": "b"}], "expected query and response, or question and answer"
    yield given.data, [{"query": "a", "response": None}], "row 0 of .* has no text"
    yield given.data, [{"query": "a", "response": "b"}], "has 1 rows .* 16 batches of 4 take 64"
    yield given.tests / "gsm8k.json", [{"question": "a", "answer": "7"}], "row 0 .* has no answer"
    yield given.text.with_suffix(".json"), [{"passage": "a"}], "expected text"


def test_files_of_another_kind_are_refused_before_a_model_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "load_base", None)
    given = places(tmp_path, base)
    for path, rows, words in bad_files(given):
        before = path.read_bytes() if path.exists() else None
        path.write_text(json.dumps(rows))
        text = path if path.stem == "text" else given.text
        with pytest.raises(UserError, match=words):
            paper(PEFTS, replace(given, text=text), [].append)
        path.unlink() if before is None else path.write_bytes(before)
    with pytest.raises(UserError, match=r"no settings of the suite math .* --settings_of, one of"):
        paper(PAPERS, given, [].append)


def test_a_half_written_checkpoint_is_passed_over(tmp_path: Path) -> None:
    assert last_peer_checkpoint(tmp_path) is None
    for step, state in ((9, '{"global_step": 9}'), (10, '{"global_step": 10}'), (11, '{"glo'),
                        (12, None)):  # fmt: skip
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    assert last_peer_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_whole_checkpoint(tmp_path) is None  # ours know their own alone


def test_what_does_not_fit_is_said_and_the_others_go_on(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("full-16bit", "qlora-nf4", "principal-nf4")
    given, tried, lines = places(tmp_path, base, methods=names), [], []

    def go(self: stages.Stages) -> None:
        tried.append(self.name)
        if self.name == "qlora-nf4":
            raise OutOfMemoryError("out of memory: too large.")

    monkeypatch.setattr(stages.Stages, "go", go)
    monkeypatch.setattr("benchmarks.quality.paper.run.card", lambda: ("NVIDIA H100", 10**5))
    assert paper(PEFTS, given, lines.append) == []
    assert tried == ["qlora-nf4", "principal-nf4"]
    assert "full-16bit is left out: it takes 0 GB at the least, and NVIDIA H100 has 0." in lines
    assert "qlora-nf4 does not fit: out of memory: too large." in lines
    assert any("at 40% of the 989 TFLOP/s of NVIDIA H100 about" in line for line in lines)


def test_memory_that_runs_out_in_a_peer_is_a_sentence() -> None:
    with (
        pytest.raises(OutOfMemoryError, match="out of memory: CUDA out of"),
        in_a_sentence(),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(RuntimeError, match="another"), in_a_sentence():
        raise RuntimeError("another")
