"""`leanlift eval`: against one row at a time, without padding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from test_cli import complaint
from tiny import load, make_checkpoint, make_tokenizer

from leanlift import LiftConfig, get_lift_model, merge_adapter, save_adapter
from leanlift.cli import build_parser, main
from leanlift.model import lift_layers
from leanlift.training.data import load_rows
from leanlift.training.evaluate import (
    evaluate,
    greedy_answers,
    last_number,
    pad_left,
    same_answer,
    sum_of_losses,
    to_samples,
)

EVAL_OPTIONS = {
    "help",
    "model_name_or_path",
    "adapter",
    "data",
    "dataset_text_field",
    "load_in_4bit",
    "load_in_8bit",
    "dtype",
    "batch_size",
    "max_new_tokens",
    "limit",
    "json",
    "output",
}

ROWS = [
    {"prompt": "add 1 and 22: ", "completion": "23"},
    {"prompt": "x", "completion": "a much longer completion than the others"},
    {"prompt": "a long prompt that has a short completion: ", "completion": "y"},
    {"prompt": "echo abc: ", "completion": "abc"},
    {"prompt": "five ", "completion": "5"},
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("eval") / "base", dtype=torch.float16)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_lift_model(load(base), LiftConfig(density=0.1, approx_rank=4), progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    directory = tmp_path_factory.mktemp("eval") / "adapter"
    save_adapter(model, directory)
    return directory


@torch.no_grad()
def oracle_loss(model, tokenizer, row) -> tuple[float, int]:
    """One row, no padding, the loss as torch has it."""
    prompt = tokenizer(row["prompt"])["input_ids"]
    ids = tokenizer(row["prompt"] + row["completion"] + "</s>")["input_ids"]
    logits = model(torch.tensor([ids])).logits[0]
    total = F.cross_entropy(logits[len(prompt) - 1 : -1], torch.tensor(ids[len(prompt) :]))
    count = len(ids) - len(prompt)
    return float(total) * count, count


@torch.no_grad()
def oracle_answer(model, tokenizer, row, new: int) -> str:
    """Greedy, one token at a time, the whole text again each time."""
    ids = tokenizer(row["prompt"])["input_ids"]
    start = len(ids)
    for _ in range(new):
        token = int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        ids = [*ids, token]
    return tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_equals_one_row_at_a_time(base: Path, pad_is_eos: bool) -> None:
    model, tokenizer = load(base, "dense").eval(), make_tokenizer()
    if pad_is_eos:
        tokenizer.pad_token = tokenizer.eos_token
    samples = to_samples(Dataset.from_list(ROWS), tokenizer)
    total, tokens = sum_of_losses(model, samples, 3)
    expected = [oracle_loss(model, tokenizer, row) for row in ROWS]
    assert tokens == sum(count for _, count in expected)
    assert math.isclose(total, sum(loss for loss, _ in expected), rel_tol=1e-5)
    answers = greedy_answers(model, tokenizer, samples, 3, 6)
    assert answers == [oracle_answer(model, tokenizer, row, 6) for row in ROWS]


def test_left_padding_changes_nothing(base: Path) -> None:
    model = load(base, "dense").eval()
    with torch.no_grad():
        alone = model(**pad_left([[5, 6, 7]], model.device)).logits[0]
        beside = model(**pad_left([[5, 6, 7], list(range(5, 40))], model.device)).logits[0, -3:]
    torch.testing.assert_close(alone, beside, rtol=1e-5, atol=1e-5)


def test_text_chats_and_alpaca_rows_are_taken(base: Path) -> None:
    model, tokenizer = load(base, "dense"), make_tokenizer()
    model.train()
    text = evaluate(model, tokenizer, Dataset.from_list([{"text": "abc"}]), progress=False)
    assert (text.tokens, text.generated, text.exact_match) == (3, 0, None)
    assert model.training
    rows = [{"instruction": "say 4", "input": "", "output": "4", "answer": "4.0"}]
    alpaca = evaluate(model, tokenizer, Dataset.from_list(rows), max_new_tokens=2, progress=False)
    assert (alpaca.generated, alpaca.judged_by) == (1, "answer")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "bc")) * 2]
    chat = evaluate(
        model, tokenizer, Dataset.from_list([{"messages": turns}]), max_new_tokens=2, progress=False
    )
    assert (chat.rows, chat.generated, chat.tokens) == (2, 2, 6)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 1,200 + 34 = 1,234.", 1234.0),
        ("The answer is -5.", -5.0),
        ("$3.50 each, 7 in all: 24.5 dollars", 24.5),
        ("1, 2, 3", 3.0),
        ("none", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("that is 576", "576.0", True),
        ("576 minus 1 is 575", "576", False),
        ("it is 0.3334", "0.333", True),
        ("1,000", "1000", True),
        ("no number", "1", False),
        ("A or B? The answer is (B).", "B", True),
        ("the correct answer is option2", "option2", True),
        ("the correct answer is false", "true", False),
        (" Paris ", "Paris", True),
    ],
)
def test_answers(text: str, answer: str, right: bool) -> None:
    assert same_answer(text, answer) is right


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
