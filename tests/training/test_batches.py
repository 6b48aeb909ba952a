"""The batches that a run will have, and a plan for those that it had."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from sweeps import swept
from tiny import make_checkpoint

from leanlift.data.dataset import TokenRows
from leanlift.data.lengths import LengthReport
from leanlift.io.measured import categories_compared, difference
from leanlift.plan import Batch
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.batches import Batches, LargestBatch, lengths_of, worst_batch
from leanlift.training.loss import TRAINED

ROWS = [
    ([1, 2, 3], [-100, 2, 3]),
    ([1, 2, 3, 4, 5], [1, 2, -100, -100, 5]),
    ([1], [1]),
    ([1, 2, 3, 4], [-100, -100, -100, 4]),
    ([1, 2], [1, -100]),
]


def token_rows(rows: list[tuple[list[int], list[int]]]) -> TokenRows:
    features = Features({"input_ids": List(Value("int32")), "labels": List(Value("int32"))})
    made = {"input_ids": [ids for ids, _ in rows], "labels": [labels for _, labels in rows]}
    report = LengthReport("train", len(rows), max(len(ids) for ids, _ in rows), 0, 0, None)
    return TokenRows(Dataset.from_dict(made, features=features), report)


def settings(**changes: Any) -> Any:
    plain = {"pad_to_multiple_of": None, "dataset_kwargs": None}
    return SimpleNamespace(**{**plain, **changes})


@pytest.mark.parametrize("chosen", [[0, 1, 2, 3, 4], [4, 1], [2]])
def test_lengths_are_those_of_the_rows(chosen: list[int]) -> None:
    rows = [ROWS[i] for i in chosen]
    whole = token_rows(ROWS).data
    for data in (token_rows(rows).data, whole.select(chosen)):
        lengths, trained = lengths_of(data)
        assert lengths.tolist() == [len(ids) for ids, _ in rows]
        assert trained.tolist() == [sum(n != -100 for n in labels[1:]) for _, labels in rows]


@pytest.mark.parametrize("size", [1, 2, 3, 9])
@pytest.mark.parametrize("multiple", [None, 4])
def test_no_batch_is_larger_than_the_worst(size: int, multiple: int | None) -> None:
    found = worst_batch(token_rows(ROWS), size, settings(pad_to_multiple_of=multiple), False)
    assert found is not None
    each = [(len(ids), sum(n != -100 for n in labels[1:])) for ids, labels in ROWS]
    batches = list(itertools.combinations(each, min(size, len(ROWS))))
    longest = max(length for batch in batches for length, _ in batch)
    assert found.rows == min(size, len(ROWS))
    assert found.tokens == (longest if multiple is None else 8)
    assert found.trained == max(sum(trained for _, trained in batch) for batch in batches)
    assert found.padded == (size > 1 or multiple is not None)


def test_of_what_nobody_has_looked_at_nothing_is_known() -> None:
    assert worst_batch(iter(()), 2, settings(), False) is None
    assert worst_batch(token_rows(ROWS), 2, settings(), packing=True) is None
    prepared = settings(dataset_kwargs={"skip_prepare_dataset": True})
    assert worst_batch(token_rows(ROWS), 2, prepared, False) is None


def test_the_largest_batch_is_kept_for_any_number_of_steps() -> None:
    largest = LargestBatch()
    assert largest.within() is None
    sizes = [(5, 2, 4), (5, 2, 3), (6, 2, 9), (8, 2, 9), (9, 2, 12)]  # step, rows, tokens
    for step, rows, tokens in sizes:
        mask = torch.ones(rows, tokens)
        mask[0, -1] = tokens == 9
        found = {"input_ids": torch.zeros(rows, tokens), "attention_mask": mask}
        largest.see({**found, TRAINED: torch.zeros(3)}, step)
    largest.see({"other": 1}, 9)
    assert largest.within(1) == Batch(2, 4, 3, padded=True)
    assert largest.within(3) == Batch(2, 9, 3, padded=False)
    assert largest.within() == Batch(2, 12, 3, padded=True)


def test_of_batches_of_one_size_the_mask_of_one_counts_with_the_tokens_of_another() -> None:
    largest = LargestBatch()
    for full, trained in [(True, 5), (False, 3), (True, 9)]:
        mask = torch.ones(2, 8)
        mask[0, -1] = full
        ids = {"input_ids": torch.zeros(2, 8), "attention_mask": mask}
        largest.see({**ids, TRAINED: torch.zeros(trained)}, 0)
    assert largest.within() == Batch(2, 8, 9, padded=True)


@pytest.mark.parametrize(("starts", "masked"), [([0], False), ([0, 3], True)])
def test_a_pack_of_one_row_takes_no_mask(starts: list[int], masked: bool) -> None:
    places = torch.arange(8)
    for start in starts:
        places[start:] = torch.arange(8 - start)
    largest = LargestBatch()
    largest.see({"input_ids": torch.zeros(1, 8), "position_ids": places[None]}, 0)
    assert largest.within() == Batch(1, 8, None, padded=masked)


def prompts(length: int, spread: int) -> list[dict[str, str]]:
    return [{"prompt": "a" * (length + i % (spread + 1)), "completion": "b" * 5} for i in range(24)]


KINDS: dict[str, tuple[list[dict[str, str]], dict[str, Any]]] = {
    "short rows under a long max_length": (prompts(20, 0), {"max_length": 1024}),
    "rows of unlike lengths": (prompts(10, 60), {"max_length": 256}),
    "one long row that may not be met": (
        [*prompts(12, 3), *prompts(200, 0)[:1]], {"max_length": 256}),
    "rows that are cut": (prompts(50, 12), {"max_length": 64}),
    "texts": ([{"text": "0123456789" * (1 + i % 5)} for i in range(24)], {"max_length": 256}),
    "one at a time": (
        prompts(30, 40), {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}),
    "padded to a multiple": (prompts(50, 3), {"pad_to_multiple_of": 32}),
    "packed": (prompts(20, 30), {"packing": True, "max_length": 128}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("batches") / "base"
    return make_checkpoint(place, tied=False, hidden=128, intermediate=320)


@pytest.mark.parametrize("kind", swept(KINDS, "rows of unlike lengths"))
def test_what_is_compared_is_the_planners_error(base: Path, tmp_path: Path, kind: str) -> None:
    rows, changes = KINDS[kind]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    args = RunArguments(str(base), str(data), approx_rank=8)
    options = {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "bf16": False, "max_steps": 3,
        "per_device_train_batch_size": 8, "save_strategy": "no", "report_to": "none",
        "gradient_checkpointing": False, **changes,
    }  # fmt: skip
    sft = LiftSFTConfig(**options)
    planned: list[tuple[Batches, int]] = []

    def plan(batches: Batches) -> Any:
        made = plan_of(args, sft, False, batches)
        planned.append((batches, made.phases["train"]))
        return made

    report = run(args, sft, plan=plan).memory
    assert report.plan is not None
    before, measured = planned[0][1], sum(report.categories.values())
    assert report.plan["phases"]["train"] == pytest.approx(measured, rel=0.05)
    assert before >= 0.95 * measured, "a run is planned for the worst batch"
    if kind == "short rows under a long max_length":
        assert before == pytest.approx(measured, rel=0.05)
    if kind == "one long row that may not be met" and before > 1.5 * measured:
        assert any("the largest batch among the steps" in note for note in report.plan["notes"])


@pytest.mark.parametrize(
    ("name", "planned", "measured", "said"),
    [
        ("gradients", 105, 100, "+5.0 %"),
        ("gradients", 100, 100, "0 %"),
        ("gradients", 100_003, 100_000, "0 %"),
        ("gradients", 88, 100, "-12 %"),
        ("retired entries", 180, 100, "within"),
        ("retired entries", 100, 200, "-50 %"),
        ("select", 110, 100, "within"),
        ("gradients", None, 100, "–"),
    ],
)
def test_a_difference_in_words(name: str, planned: int | None, measured: int, said: str) -> None:
    mib = 2**20

    def found(scale: int) -> str:
        before = None if planned is None else planned * scale
        plan = None if before is None else {"categories": {name: before}, "phases": {}}
        return difference(
            categories_compared({"categories": {name: measured * scale}, "plan": plan})[0]
        )

    assert found(mib) == said
    assert found(1) == "–", "below a MiB a difference says nothing"
