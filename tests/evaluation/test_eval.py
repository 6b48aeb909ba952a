"""`leanlift eval`: against one row at a time, without padding."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from asked import ROWS
from command import complaint
from datasets import Dataset
from sweeps import swept
from tiny import load, make_tokenizer

from leanlift.cli import main
from leanlift.evaluation import answers
from leanlift.evaluation.answers import losses_of
from leanlift.evaluation.evaluate import (
    evaluate,
    greedy_answers,
    pad_left,
    sum_of_losses,
    to_samples,
)


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


@pytest.mark.parametrize("key", swept(SPOILERS, *list(SPOILERS)[::4]))
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


def test_of_long_texts_few_are_taken_at_a_time(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = load(base).eval(), make_tokenizer()
    samples = to_samples([{"text": "ab" * n} for n in range(3, 12)], tokenizer)
    expected, shapes = losses_of(model, samples, 4), []
    model.lm_head.register_forward_hook(lambda _, __, logits: shapes.append(tuple(logits.shape)))
    bound = 2 * 23 * len(tokenizer)  # two of the longest
    monkeypatch.setattr(answers, "LOGITS", bound)
    assert losses_of(model, samples, 4) == pytest.approx(expected, rel=1e-4)
    assert {rows for rows, *_ in shapes} == {1, 2}
    assert max(math.prod(shape) for shape in shapes) <= bound
    monkeypatch.setattr(answers, "LOGITS", 1)
    assert losses_of(model, samples, 4) == pytest.approx(expected, rel=1e-4)
