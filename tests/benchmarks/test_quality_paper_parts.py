"""The parts of the paper's runs that need no model: order, answers, cost, pace, tables, texts."""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import make_checkpoint, make_tokenizer
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

pytest.importorskip("peft")

from paper_suites import PEFTS
from peft import LoraConfig, get_peft_model

from benchmarks.quality.methods import TARGETS
from benchmarks.quality.paper import BASES, SUITES, Given
from benchmarks.quality.paper.command import add_arguments, from_arguments
from benchmarks.quality.paper.cost import Rows, Shapes, in_hours, peak_of, selection
from benchmarks.quality.paper.given import SAMPLES, base_of
from benchmarks.quality.paper.lift import Lift
from benchmarks.quality.paper.pace import Pace
from benchmarks.quality.paper.peers import Full, Lora
from benchmarks.quality.paper.rows import PROMPT, in_their_order, texts_of
from benchmarks.quality.paper.score import number, same, stated
from benchmarks.quality.paper.table import COLUMNS, TESTS, markdown, read, write
from benchmarks.quality.paper.task import Task
from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.errors import Interrupted


def test_rows_come_in_the_order_of_pefts_comparison(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sizes = [(7 * i) % 50 for i in range(170)]
    rows = [{"query": "q" * n, "response": f"{i}"} for i, n in enumerate(sizes)]
    rows[3]["query"] = "q" * 1300  # with a space and the response too long
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    texts = in_their_order(tmp_path / "rows.json", tokenizer, steps=25, batch=4)
    assert len(texts) == 100
    kept = [row for i, row in enumerate(rows) if i != 3]
    for start, stop in ((0, 80), (80, 100)):  # buckets of 20 batches, the second one cut
        lengths = [len(text) for text in texts[start:stop]]
        assert lengths == sorted(lengths, reverse=True)
        bucket = {
            PROMPT.format(query=row["query"]) + row["response"] for row in kept[start : start + 80]
        }
        assert set(texts[start:stop]) <= bucket
    assert max(map(len, texts[80:])) == max(
        len(PROMPT.format(query=row["query"]) + row["response"]) for row in kept[80:160]
    )


ANSWERS = [
    ("So it is 4.\nThe answer is: 4", "4"),
    ("The answer is 4.", "4"),
    ("The answer is: $16$.", "16"),
    ("The answer is: 50%", "50"),
    ("The answer is: 3\nQuestion: next", "3"),
    ("The answer is: 3. Wait. The answer is: 5", "5"),
    ("Six and one.\n#### 7", "7"),
    ("I do not know", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "wanted"), ANSWERS)
def test_what_a_text_says_that_the_answer_is(text: str, wanted: str | None) -> None:
    assert stated(text) == wanted


def test_answers_are_compared_by_value() -> None:
    alike = [("4", "4.0"), ("20/35", "0.5714285714285714"), ("x+1", "x+1"), ("1e2", "100")]
    other = [("4", "5"), ("4", "x"), (None, "4"), ("4", None), ("nan", "nan"), ("x", "y")]
    assert all(same(*pair) for pair in alike)
    assert not any(same(*pair) for pair in other)
    assert [number(text) for text in ("1/0", "0/0", "1/2/3", "sNaN", "", "1,000")] == [None] * 6


TOKENS = 48


def lifted(model: Any) -> Any:
    config = LiftConfig(density=0.05, approx_rank=2)
    return get_lift_model(model, config, progress=False)


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(r=2, target_modules=TARGETS, task_type="CAUSAL_LM"))


def first_inputs(shapes: Shapes, rank: int) -> int:
    """Operations of the gradient that the embedding would get: nobody asks for it where it is
    frozen. Those of adapters are [rank, n] on the way in."""
    first = [(m, n) for name, m, n in shapes.linears if "layers.0." in name and name[-6] in "qkv"]
    assert len(first) == 3
    return sum(2 * TOKENS * n * (m + rank) for m, n in first)


KINDS = {
    "full": (Full(), lambda model: model, None),
    "LoRA": (Lora("16bit", TARGETS, rank=2), with_lora, 2),
    "leanlift": (Lift("16bit", {"density": 0.05, "selector": "random"}), lifted, 0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_that_torch_counts(tmp_path: Path, kind: str) -> None:
    method, make, rank = KINDS[kind]
    base = make_checkpoint(tmp_path)
    model = make(AutoModelForCausalLM.from_pretrained(base, attn_implementation="eager")).train()
    ids = torch.arange(TOKENS)[None] % 90 + 3
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    shapes, rows = Shapes.of(str(base)), Rows([TOKENS], steps=1, seen=1)
    made = method.operations(a_task(rows, gradient_checkpointing=False), shapes)
    halves = 3 * 2 * TOKENS**2 * shapes.width  # torch counts what the causal mask leaves out
    left_out = 0 if rank is None else first_inputs(shapes, rank)
    if kind == "leanlift":  # products into a buffer (out=), which torch does not count
        left_out += 2 * TOKENS * sum(m * n for _, m, n in shapes.linears)
    assert made + halves == counter.get_total_flops() + left_out
    again = method.operations(a_task(rows, gradient_checkpointing=True), shapes) - made
    assert again >= shapes.passes(rows, True) - shapes.passes(rows, False) > 0


def a_task(rows: Rows, **loop: Any) -> Task:
    mask = {"rank_budget": 2, "approx_rank": 2, "refresh_interval": 0}
    return Task("base", Path("rows"), Path("out"), mask, loop, {}, rows, print)


def test_selections_are_counted_as_often_as_there_are_refreshes(tmp_path: Path) -> None:
    shapes = Shapes.of(str(make_checkpoint(tmp_path)))
    once = selection(shapes.of_targets(None), 2)
    for interval, times in ((0, 1), (4, 2), (3, 3), (2, 4), (9, 1)):  # of 8 steps
        task = a_task(Rows([32, 64], 8, 16))
        found, none = (
            Lift("nf4", {"refresh_interval": interval, "selector": selector}).operations(
                task, shapes
            )
            for selector in ("principal", "random")
        )
        assert found - none == times * once


def test_a_selection_counts_its_cheaper_way() -> None:
    krylov, gram = 10 * 4096 * 4096 * 136, 2 * 64 * 64 * 64 + 25 * 64**3
    assert selection([(4096, 4096)], 128) == krylov + 2 * 4096 * 4096 * 128
    assert selection([(64, 64)], 60) == min(gram, 10 * 64 * 64 * 68) + 2 * 64 * 64 * 60


def test_hours_are_of_the_cards_peak() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989
    assert peak_of("NVIDIA H100 PCIe") == 756
    assert peak_of("some card") is None
    said = in_hours(0.4 * 989e12 * 7200, 989, "NVIDIA H100")
    assert said == ("about 2.85e+03 PFLOP; at 40% of the 989 TFLOP/s of NVIDIA H100 about 2 h")
    assert "--tflops" in in_hours(1e15, None, "some card")


def test_pace_leaves_out_the_first_steps_and_those_after_a_checkpoint() -> None:
    times = itertools.chain([0.0], (step + (10 if step > 6 else 0) for step in range(1, 13)))
    pace = Pace(saved=6, tokens=50.0, say=[].append, clock=lambda: next(times))
    for step in range(1, 11):
        pace.at(step, 10)
    assert pace.timed == 6  # not 1 to 3, and not 7, before which a checkpoint was written
    assert pace.facts()["tokens_per_second"] == 50.0
    assert pace.facts()["steps"] == 10
    twice = Pace(saved=100, tokens=1.0, say=[].append, clock=itertools.count().__next__)
    for step in (1, 2, 3, 4, 4, 5):
        twice.at(step, 5)
    assert twice.timed == 2


def test_a_row_that_is_made_again_takes_the_place_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    row = {"suite": "math", "method": "a", "learning_rate": 1e-4, "limit": "", "gsm8k": 0.5}
    write(path, [row, {**row, "method": "b"}])
    write(path, [{**row, "gsm8k": 0.75}, {**row, "learning_rate": 1e-3}])
    found = [(row["method"], row["learning_rate"], row["gsm8k"]) for row in read(path)]
    assert found == [("b", "0.0001", "0.5"), ("a", "0.0001", "0.75"), ("a", "0.001", "0.5")]
    assert {*TESTS, "forgetting", "peak_bytes", "tokens_per_second"} <= set(COLUMNS)


def test_a_row_stands_beside_those_of_pefts_table() -> None:
    row = {
        "method": "principal-nf4", "gsm8k": 0.5, "forgetting": 0.04, "peak_bytes": 9.87e9,
        "tokens_per_second": 7000.4, "trained": 9175040,
    }  # fmt: skip
    lines = markdown([row], ["gsm8k"], as_peft=True).splitlines()
    assert lines[2] == "| principal-nf4 | 0.500 | 0.040 | 9.9 | 7,000 | 9,175,040 |"
    assert len({line.count("|") for line in lines}) == 1
    assert any("published: SHiRA" in line and "6,893" in line for line in lines)


@pytest.mark.parametrize(("shape", "name"), BASES.items())
def test_a_base_of_the_paper_is_known_by_its_shape(
    tmp_path: Path, shape: tuple[int, int, int], name: str
) -> None:
    names = ("hidden_size", "num_hidden_layers", "vocab_size")
    config = {"model_type": "llama", **dict(zip(names, shape, strict=True))}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = Given(str(tmp_path), Path("d"), Path("t"), Path("o"))
    assert base_of(given, SUITES["math"]) == name
    assert base_of(given, SUITES["metamath"]) is None
    assert base_of(replace(given, base="3-8b"), SUITES["commonsense"]) == "3-8b"


def a_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    parser.add_argument("--data", type=Path)
    add_arguments(parser)
    return parser


PLACES = ["--model", "m", "--data", "d", "--tests", "t"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "d", "--tests", "t"], "needs --model"),
        (["--model", "m"], "needs --data, --tests"),
        (PLACES, "nothing is downloaded here"),
        ([*PLACES, "--rows_at_once", "3"], "divide the batch"),
    ],
)
def test_the_command_ends_in_one_sentence(
    more: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = a_parser()
    with pytest.raises(SystemExit, match="2"):
        from_arguments(parser.parse_args(more), parser)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("stopped", "code", "words"),
    [
        (Interrupted("saved in x", 143), "143", "saved in x"),
        (KeyboardInterrupt(), "130", "the same command goes on"),
    ],
)
def test_a_run_that_is_stopped_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stopped: BaseException,
    code: str,
    words: str,
) -> None:
    def paper(*args: Any, **kwargs: Any) -> None:
        raise stopped

    monkeypatch.setattr("benchmarks.quality.paper.command.paper", paper)
    parser = a_parser()
    with pytest.raises(SystemExit, match=code):
        from_arguments(parser.parse_args(PLACES), parser)
    assert words in capsys.readouterr().err


def test_the_sample_texts_are_what_their_readme_says() -> None:
    prose, code = (texts_of(SAMPLES.with_name(name)) for name in ("prose.txt", "code.txt"))
    chat = [json.loads(line) for line in SAMPLES.with_name("chat.jsonl").read_text().splitlines()]
    assert all(60 <= len(text.split()) <= 110 for text in prose)
    assert all(8 <= len(text.splitlines()) <= 20 for text in code)
    assert all(40 <= len(row["output"].split()) <= 90 for row in chat)
    assert all(set(row) == {"instruction", "output"} for row in chat)
    for texts in (prose, code, [row["instruction"] for row in chat]):
        assert len(texts) == len(set(texts)) == 64
        assert all(text.isascii() for text in texts)


def test_texts_are_passages_or_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n{"text": " "}\n{"text": "two"}\n')
    assert texts_of(tmp_path / "rows.jsonl") == ["one", "two"]
    assert texts_of(tmp_path / "rows.jsonl", most=1) == ["one"]
    (tmp_path / "empty.txt").write_text("\n***\n")
    with pytest.raises(UserError, match="holds no text"):
        texts_of(tmp_path / "empty.txt")


def test_the_suites_train_as_many_parameters_as_those_they_stand_beside() -> None:
    own = SUITES["metamath"].methods
    budget = {"rank_budget": 32, "target_modules": ("q_proj", "v_proj")}
    assert budget.items() <= own["principal-16bit"].mask.items()
    assert (own["lora-16bit"].rank, own["lora-16bit"].targets) == (32, ("q_proj", "v_proj"))
    assert {suite.batch for suite in (SUITES["math"], SUITES["commonsense"])} == {16}
    for suite in SUITES.values():
        loop = suite.loop
        rows = loop["per_device_train_batch_size"] * loop["gradient_accumulation_steps"]
        assert rows == suite.batch
    assert PEFTS.as_peft
