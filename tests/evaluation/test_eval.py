"""`leanlift eval`: against one row at a time, without padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from snapshots import assert_screen
from command import complaint
from tiny import load, make_checkpoint, make_tokenizer

from leanlift import LiftConfig, get_lift_model, merge_adapter, save_adapter
from leanlift.cli import build_parser, main
from leanlift.cli.eval_text import eval_text
from leanlift.cli.measure import JUDGES as OFFERED
from leanlift.model import lift_layers
from leanlift.training.data import load_rows
from leanlift.training.evaluate import (
    Sample,
    evaluate,
    greedy_answers,
    last_number,
    pad_left,
    same_answer,
    sum_of_losses,
    to_samples,
)
from leanlift.training.judge import JUDGES, are_sentences, is_right, judged_words

EVAL_OPTIONS = {
    "help",
    "model_name_or_path",
    "adapter",
    "base",
    "base_as_stored",
    "merged",
    "data",
    "dataset_text_field",
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


# --- what is measured is what was trained -----------------------------------------------------

SPOILERS: dict[str, Any] = {
    "bad_words_ids": [[5], [6]],
    "begin_suppress_tokens": list(range(3, 90)),
    "cache_implementation": "static",
    "diversity_penalty": 0.5,
    "do_sample": True,
    "early_stopping": True,
    "encoder_no_repeat_ngram_size": 1,
    "encoder_repetition_penalty": 3.0,
    "epsilon_cutoff": 0.3,
    "eta_cutoff": 0.3,
    "exponential_decay_length_penalty": (1, 9.0),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 8,
    "guidance_scale": 4.0,
    "length_penalty": 5.0,
    "max_length": 3,
    "max_new_tokens": 1,
    "max_time": 0.0,
    "min_length": 60,
    "min_new_tokens": 8,
    "min_p": 0.5,
    "no_repeat_ngram_size": 1,
    "num_beam_groups": 2,
    "num_beams": 3,
    "num_return_sequences": 2,
    "output_scores": True,
    "penalty_alpha": 0.6,
    "prefill_chunk_size": 2,
    "prompt_lookup_num_tokens": 2,
    "remove_invalid_values": True,
    "renormalize_logits": True,
    "repetition_penalty": 9.0,
    "return_dict_in_generate": True,
    "sequence_bias": [[[5], 50.0]],
    "stop_strings": ["a", "b", "c", "d", "e"],
    "suppress_tokens": list(range(3, 60)),
    "temperature": 7.0,
    "token_healing": True,
    "top_h": 0.5,
    "top_k": 3,
    "top_p": 0.2,
    "typical_p": 0.3,
    "use_cache": False,
    "watermarking_config": {"greenlist_ratio": 0.2, "bias": 9.0},
}
"""Keys of a generation config, each with a value that `generate` would follow."""


@pytest.mark.parametrize("key", SPOILERS)
def test_greedy_follows_no_generation_config(base: Path, key: str) -> None:
    model, tokenizer = load(base, "dense").eval(), make_tokenizer()
    samples = to_samples(ROWS[:2], tokenizer)
    expected = [oracle_answer(model, tokenizer, row, 6) for row in ROWS[:2]]
    setattr(model.generation_config, key, SPOILERS[key])
    own = model.generation_config
    assert greedy_answers(model, tokenizer, samples, 2, 6) == expected
    assert model.generation_config is own


def test_an_end_token_of_the_generation_config_still_ends_an_answer(base: Path) -> None:
    model, tokenizer = load(base, "dense").eval(), make_tokenizer()
    samples = to_samples(ROWS[:1], tokenizer)
    (text,) = greedy_answers(model, tokenizer, samples, 1, 6)
    model.generation_config.eos_token_id = [1, tokenizer.convert_tokens_to_ids(text[2])]
    assert greedy_answers(model, tokenizer, samples, 1, 6) == [text[: text.index(text[2])]]


def test_an_adapter_is_evaluated_as_it_was_trained(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "own.jinja"
    template.write_text(
        "{% for m in messages %}({{ m.role }}){{ m.content }}#{% endfor %}"
        "{% if add_generation_prompt %}(assistant){% endif %}"
    )
    chat = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]
    data = tmp_path / "chats.jsonl"
    data.write_text(json.dumps({"messages": chat}) + "\n")

    def measured(*argv: str) -> dict[str, Any]:
        capsys.readouterr()
        command = ["eval", "--data", str(data), "--json", "--max_new_tokens", "0", *argv]
        assert main(command) == 0
        return json.loads(capsys.readouterr().out)

    def trained(name: str, rows: Path, *argv: str) -> Path:
        command = ["train", "--model_name_or_path", str(base), "--dataset_name", str(rows)]
        command += ["--output_dir", str(tmp_path / name), "--max_steps", "1", "--approx_rank", "2"]
        command += ["--eval_dataset_name", str(rows), "--eval_strategy", "steps", "--eval_steps"]
        command += ["1", "--save_strategy", "no", "--learning_rate", "0", *argv]
        assert main(command) == 0
        return tmp_path / name

    run = trained("run", data, "--chat_template_path", str(template), "--eos_token", "#")
    state = json.loads((run / "trainer_state.json").read_text())
    *_, logged = [log["eval_loss"] for log in state["log_history"] if "eval_loss" in log]
    found = measured("--adapter", str(run))
    assert found["tokens"] == len("abc#")
    assert math.isclose(found["loss"], logged, rel_tol=1e-5)
    assert "has no chat template" in complaint(
        capsys, "eval", "--data", str(data), "--model_name_or_path", str(base)
    )

    data = tmp_path / "texts.jsonl"
    data.write_text('{"content": "abc", "text": "abcdefgh"}\n')
    run = trained("texts", data, "--dataset_text_field", "content")
    assert measured("--adapter", str(run))["tokens"] == len("abc")
    model = ("--model_name_or_path", str(base))
    assert measured(*model)["tokens"] == len("abcdefgh")
    assert measured(*model, "--dataset_text_field", "content")["tokens"] == len("abc")


def test_tokenized_rows_have_a_loss(base: Path) -> None:
    model, tokenizer = load(base, "dense").eval(), make_tokenizer()
    ids = [5, 6, 7, 8, 9, 10]
    labels = [-100, 6, -100, -100, 9, -100]
    found = evaluate(model, tokenizer, [{"input_ids": ids, "labels": labels}], progress=False)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    expected = F.cross_entropy(logits, torch.tensor(labels)[1:], ignore_index=-100)
    assert (found.tokens, found.generated) == (2, 0)
    assert math.isclose(found.loss or 0.0, float(expected), rel_tol=1e-5)


def test_answers_stay_with_their_rows_where_others_are_dropped() -> None:
    rows = [
        {"prompt": "a", "completion": "", "answer": "1"},
        {"prompt": "b", "completion": "2", "answer": "2"},
        {"prompt": "c", "completion": "3", "answer": None},
    ]
    samples = to_samples(rows, make_tokenizer())
    assert [(s.expected, s.answer) for s in samples] == [("2", "2"), ("3", None)]


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


COMPARISONS = {
    "number": [("is 1,234.", "so 1234", True), ("1 2", "2 1", False), ("7", "none", None)],
    "letter": [("so (B)", "Answer: B", True), ("A or B", "A", False), ("A", "none", None)],
    "label": [("it is true", "so: true", True), ("true", "false", False), ("x", "X Y", None)],
    "text": [(" a b ", "a b", True), ("a  b", "a b", False), ("", "", True)],
    "contains": [
        ("It is PARIS\nindeed", "paris indeed", True),
        ("a", "b", False),
        ("a", " ", None),
    ],
    "auto": [("so 5", "5", False), ("5", "5", True), (" a ", "a", True)],
}


@pytest.mark.parametrize("judge", JUDGES)
def test_each_judge_compares_its_part(judge: str) -> None:
    for text, expected, right in COMPARISONS[judge]:
        assert is_right(text, Sample([1], [1], [1], expected), judge) is right, (text, expected)
    answered = Sample([1], [1], [1], "nothing of it", "5.0")
    assert is_right("so it is 5", answered, "auto") is True
    assert is_right("so it is 5", answered, "text") is False
    said = judged_words([answered], judge)
    assert said.startswith("Exact match compares ")
    assert "the answer column" in said


def test_the_judges_are_those_that_the_command_line_offers() -> None:
    assert JUDGES == OFFERED
    assert set(COMPARISONS) == set(JUDGES)


def test_what_wants_nothing_of_the_judges_kind_is_not_counted(base: Path) -> None:
    rows = [{"prompt": "a", "completion": "12"}, {"prompt": "b", "completion": "no number"}]
    found = evaluate(
        load(base, "dense"),
        make_tokenizer(),
        rows,
        max_new_tokens=2,
        progress=False,
        judge="number",
    )
    assert (found.generated, found.judged, found.judge) == (2, 1, "number")


def test_sentences_are_told_from_words() -> None:
    long = [Sample([1], [1], [1], "it is because the sky is blue")]
    assert are_sentences(long, "auto")
    assert not are_sentences(long, "contains")
    assert not are_sentences([Sample([1], [1], [1], "blue")], "auto")
    assert not are_sentences([Sample([1], [1], [1], long[0].expected, "4")], "auto")


@pytest.mark.parametrize("key", ["messages", "conversations"])
def test_the_answer_of_a_chat_is_that_of_its_last_turn(key: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    names = ("role", "content") if key == "messages" else ("from", "value")
    people = ("user", "assistant") if key == "messages" else ("human", "gpt")
    turns = [dict(zip(names, turn, strict=True)) for turn in zip(people * 2, "abcd", strict=True)]
    rows = [
        {key: turns, "answer": "7"},
        {key: turns[:2], "answer": "8"},
        {key: turns, "answer": None},
    ]
    found = [(s.expected, s.answer) for s in to_samples(rows, tokenizer)]
    assert found == [(None, None), ("d", "7"), ("b", "8"), ("b", None), ("d", None)]


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
        "rows": 30, "tokens": 4012, "models": models,
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
