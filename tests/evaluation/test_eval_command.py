"""`leanlift eval` on the command line: one model, several side by side, mistakes."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from asked import ROWS
from command import complaint
from snapshots import assert_screen
from tiny import load, make_tokenizer

from leanlift import merge_adapter
from leanlift.cli import build_parser, main
from leanlift.cli.eval_text import eval_text
from leanlift.data.dataset import load_rows
from leanlift.evaluation.evaluate import (
    Sample,
    greedy_answers,
    to_samples,
)
from leanlift.rows.judge import judged_words

EVAL_OPTIONS = {
    "help",
    "model_name_or_path",
    "adapter",
    "base",
    "base_as_stored",
    "merged",
    "data",
    "max_length",
    "dataset_text_field",
    "formatting_func",
    "load_in_4bit",
    "load_in_8bit",
    "dtype",
    "batch_size",
    "max_new_tokens",
    "judge",
    "limit",
    "json",
    "output",
    "predictions",
}


def test_command(
    base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> dict:
        assert main(["eval", "--data", str(data), "--max_new_tokens", "3", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)

    out = tmp_path / "result.json"
    with_adapter = run("--adapter", str(adapter), "--output", str(out))
    assert json.loads(out.read_text()) == with_adapter
    assert with_adapter["model"] == str(base)
    assert with_adapter["base_format"] == "nf4+double"
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", onto="quantized")
    merged = run("--model_name_or_path", str(tmp_path / "merged"))
    assert math.isclose(merged["loss"], with_adapter["loss"], rel_tol=1e-4)
    plain = run("--model_name_or_path", str(base), "--load_in_4bit", "--limit", "2")
    assert (plain["rows"], plain["base_format"]) == (2, "nf4+double")
    eight = run("--model_name_or_path", str(base), "--load_in_8bit")
    assert eight["loss"] != plain["loss"]
    argv = ["eval", "--model_name_or_path", str(base), "--data", str(data), "--batch_size", "2"]
    assert main([*argv, "--max_new_tokens", "2"]) == 0
    assert "exact match" in capsys.readouterr().out


def test_the_options_are_a_reviewed_set() -> None:
    (choices,) = [action.choices for action in build_parser()._subparsers._group_actions]
    assert {action.dest for action in choices["eval"]._actions} == EVAL_OPTIONS


def test_mistakes(
    base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: str) -> str:
        return complaint(capsys, "eval", "--data", str(data), *argv)

    assert "nothing to evaluate" in refused()
    assert "--merged is measured beside others" in refused("--merged", "M")
    model = ("--model_name_or_path", str(base))
    assert "exclude each other" in refused(*model, "--load_in_4bit", "--load_in_8bit")
    assert "expected a dtype" in refused(*model, "--dtype", "int3")
    assert "limit of at least 1" in refused(*model, "--limit", "0")
    assert "batch_size of at least 1" in refused(*model, "--batch_size", "0")
    assert "is no leanlift adapter" in refused("--adapter", str(base))
    assert "load the base in the same format" in refused(
        "--adapter", str(adapter), "--load_in_8bit"
    )
    assert "does not exist" in refused("--model_name_or_path", str(tmp_path / "none"))
    none = str(tmp_path / "none.json")
    assert "does not exist" in complaint(capsys, "eval", "--data", none, *model)
    other = tmp_path / "other.jsonl"
    other.write_text('{"question": "a"}\n')
    assert "expected messages" in complaint(capsys, "eval", "--data", str(other), *model)
    assert len(load_rows(str(data))) == len(ROWS)


# --- several models in one table --------------------------------------------------------------


def test_base_adapter_and_merged_side_by_side_are_what_each_is_alone(
    base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*argv: str) -> dict[str, Any]:
        assert main(["eval", "--data", str(data), "--max_new_tokens", "3", "--json", *argv]) == 0
        return json.loads(capsys.readouterr().out)

    merge_adapter(adapter, tmp_path / "merged", dtype="float32", onto="quantized", progress=False)
    one = ("--adapter", str(adapter))
    together = run(*one, "--base", "--base_as_stored", "--merged", str(tmp_path / "merged"))
    names = ["base as stored", "base", "base + adapter", "merged"]
    assert [model["name"] for model in together["models"]] == names
    of_base = ("--model_name_or_path", str(base))
    alone = [
        run(*of_base),
        run(*of_base, "--load_in_4bit"),
        run(*one),
        run("--model_name_or_path", str(tmp_path / "merged")),
    ]
    for found, expected in zip(together["models"], alone, strict=True):
        assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-6), found["name"]
        assert found["base_format"] == expected["base_format"]
    assert len({round(model["loss"], 5) for model in together["models"][:3]}) == 3
    assert together["loss"] == together["models"][2]["loss"]
    assert (together["adapter"], together["model"]) == (str(adapter), str(base))
    assert list(alone[2]) == list(together)  # one shape, whatever is asked for


def test_predictions_are_lines_of_json(
    base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "predictions.jsonl"
    argv = ["eval", "--data", str(data), "--adapter", str(adapter), "--base"]
    argv += ["--max_new_tokens", "4", "--judge", "contains", "--predictions", str(out)]
    assert main(argv) == 0
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [(row["prompt"], row["expected"]) for row in rows] == [
        (row["prompt"], row["completion"]) for row in ROWS
    ]
    model, tokenizer = load(base).eval(), make_tokenizer()
    expected = greedy_answers(model, tokenizer, to_samples(ROWS, tokenizer), 8, 4)
    assert [row["answers"]["base"] for row in rows] == expected
    assert all(row["right"]["base"] is (row["expected"] in row["answers"]["base"]) for row in rows)
    shown = capsys.readouterr().out
    assert "The first 3 of 5 rows with an answer" in shown
    assert "the text has to contain the completion" in shown
    assert max(map(len, shown.splitlines())) <= 80 + len(str(tmp_path.parent))


def test_mistakes_of_a_comparison(
    base: Path, data: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*argv: str) -> str:
        return complaint(capsys, "eval", "--data", str(data), *argv)

    model, over = ("--model_name_or_path", str(base)), ("--adapter", str(adapter))
    assert "a judge among auto, number" in refused(*model, "--judge", "numbers")
    assert "give --adapter too" in refused(*model, "--base")
    assert "this one is not" in refused(*model, "--base_as_stored")
    assert "does not exist" in refused(*over, "--merged", str(tmp_path / "none"))
    assert "it is a leanlift adapter" in refused(*over, "--merged", str(adapter))
    assert "a directory that exists" in refused(*over, "--predictions", str(tmp_path / "a" / "b"))
    assert "wants answers" in refused(*over, "--predictions", "x", "--max_new_tokens", "0")


def test_the_screen_of_a_comparison() -> None:
    def model(name: str, loss: float, right: float, seconds: float) -> dict[str, Any]:
        return {"name": name, "loss": loss, "perplexity": math.exp(loss), "exact_match": right,
                "judged": 30, "seconds": seconds}  # fmt: skip

    models = [
        model("base as stored", 0.9612, 2 / 30, 41.3),
        model("base", 0.9874, 1 / 30, 44.0),
        model("base + adapter", 0.8251, 9 / 30, 61.2),
        model("merged", 0.7923, 10 / 30, 45.1),
    ]
    data = {
        "model": "Qwen/Qwen2.5-7B-Instruct", "adapter": "runs/math", "data": "gsm8k_test.json",
        "rows": 30, "tokens": 4012, "models": models, "is_text": False,
        "compared": judged_words([Sample([1], [1], [1], "so it is 4", "4")], "auto"),
    }  # fmt: skip
    weights = ["as stored", "NF4", "NF4 + offsets", "as stored"]
    answers = {
        m["name"]: f"He needs {i} boxes, so the answer is {i}." for i, m in enumerate(models)
    }
    row = {
        "prompt": "user\nHow many boxes?\nassistant\n", "expected": "He needs 2. " * 30,
        "answer": "2", "answers": answers,
        "right": {name: "2" in text for name, text in answers.items()},
    }  # fmt: skip
    assert_screen(eval_text(data, weights, [row], 30, False), "eval")
    alone = {**data, "models": models[2:3], "compared": None}
    plain = eval_text(alone, weights[2:3], [], 0, True)
    assert "--base measures the base" in plain
    assert "go by the loss" in plain
    text = eval_text({**alone, "is_text": True}, weights[2:3], [], 0, False)
    assert "30 windows, 4.01 k tokens" in " ".join(text.split())


def test_rows_are_first_looked_at_by_the_column_that_the_adapter_was_trained_on(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("leanlift.cli.eval.eval_command", lambda options: seen.append(options) or 0)
    copy, data = tmp_path / "adapter", tmp_path / "rows.jsonl"
    shutil.copytree(adapter, copy)
    data.write_text('{"body": "a text"}\n')
    command = ["eval", "--adapter", str(copy), "--data", str(data)]
    (copy / "run.json").write_text('{"dataset_text_field": "body"}')
    assert main(command) == 0
    (copy / "run.json").write_text("{}")
    assert main(command) == 2
    assert len(seen) == 1
    command[2] = "acme/adapter"  # on the hub, where nothing has been read yet
    assert main(command) == 0
    command[-1] = str(tmp_path / "none.jsonl")
    assert main(command) == 2
    assert len(seen) == 2
