"""Rows in the trainer: whatever form they come in, whatever the settings, and what is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset, DatasetDict, IterableDataset
from sweeps import swept
from tiny import load, make_checkpoint
from tokenizers_of_all_kinds import CHATML, characters
from transformers import TrainingArguments

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.data.dataset import token_rows
from leanlift.data.lengths import Cut
from leanlift.data.stream import token_stream
from leanlift.data.tokens import Tokenization
from leanlift.training import LiftSFTConfig

ROWS = [{"prompt": f"{i} is ", "completion": "x" * (1 + 3 * i)} for i in range(7)]
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"q{i}"},
            {"role": "assistant", "content": f"a{i}"},
            {"role": "user", "content": "and?"},
            {"role": "assistant", "content": f"b{i}"},
        ]
    }
    for i in range(3)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    base = make_checkpoint(tmp_path_factory.mktemp("rows") / "base")
    return get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False)


def trainer_of(model: Any, out: Path, rows: Any = ROWS, **more: Any) -> LiftTrainer:
    given = {key: more.pop(key) for key in list(more) if key in ("eval_dataset", "formatting_func")}
    settings = {
        "output_dir": str(out),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_length": 64,
        **more,
    }
    return LiftTrainer(
        model=model,
        args=LiftSFTConfig(**settings),
        train_dataset=rows,
        processing_class=characters(CHATML),
        **given,
    )


def ids_of(rows: Any, how: Tokenization | None = None) -> list[dict[str, Any]]:
    return list(token_rows(rows, how or Tokenization.of(characters(CHATML))).data)


# --- forms of rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", swept([ROWS, CHATS], ROWS), ids=["strings", "chats"])
def test_lists_datasets_and_streams_are_trained_alike(
    model: Any, tmp_path: Path, rows: list[dict[str, Any]]
) -> None:
    expected = ids_of(rows)
    data = Dataset.from_list(rows)
    forms = {
        "list": rows,
        "dataset": data,
        "tokenized": Dataset.from_list(expected),
        "torch": Dataset.from_list(expected).with_format("torch"),
        "stream": data.to_iterable_dataset(num_shards=2),
        "generator": IterableDataset.from_generator(lambda: iter(rows)),
        "token stream": Dataset.from_list(expected).to_iterable_dataset(),
    }
    for name, form in forms.items():
        trainer = trainer_of(model, tmp_path, form)
        found = [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset]
        assert found == expected, name
        trainer.train()


def test_a_stream_drops_cuts_and_refuses_as_a_dataset_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = [
        *ROWS,
        {"prompt": "z" * 90, "completion": "y"},
        {"prompt": "z", "completion": ""},
        {"prompt": "z", "completion": "y" * 90},
    ]
    how, cut = Tokenization.of(characters()), Cut(max_length=64)
    stream = Dataset.from_list(rows).to_iterable_dataset()
    assert list(token_stream(stream, how, "train", cut)) == list(
        token_rows(rows, how, cut=cut).data
    )
    assert "row 8 of the train dataset: an empty text or completion" in caplog.text
    bad = Dataset.from_list([*ROWS, {"prompt": "z", "completion": None}]).to_iterable_dataset()
    with pytest.raises(UserError, match="row 7 of the train dataset has no 'completion'"):
        list(token_stream(bad, how, "train", cut))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([], "holds no rows"),
        (DatasetDict({"train": Dataset.from_list(ROWS)}), "is a DatasetDict: expected a Dataset"),
        ("rows.json", "is a str: expected a Dataset"),
        (Dataset.from_list(ROWS).with_transform(dict), "has a transform"),
        (IterableDataset.from_generator(lambda: iter(())), "holds no rows"),
        (IterableDataset.from_generator(lambda: iter([{"a": 1}])), "has the columns"),
    ],
    ids=["empty", "several", "name", "transform", "empty-stream", "strange-stream"],
)
def test_what_is_no_rows(model: Any, tmp_path: Path, rows: Any, match: str) -> None:
    with pytest.raises(UserError, match=match):
        trainer_of(model, tmp_path, rows)


def test_plain_training_arguments_are_taken(model: Any, tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    trainer = LiftTrainer(
        model=model, args=args, train_dataset=ROWS, processing_class=characters(CHATML)
    )
    assert list(trainer.train_dataset) == ids_of(ROWS)
    assert trainer.args.max_steps == 1


def test_a_formatting_function(model: Any, tmp_path: Path) -> None:
    def text(row: dict[str, Any]) -> str:
        return f"{row['prompt']}={row['completion']}"

    expected = ids_of([{"text": text(row)} for row in ROWS])
    for rows in (ROWS, Dataset.from_list(ROWS), Dataset.from_list(ROWS).to_iterable_dataset()):
        trainer = trainer_of(model, tmp_path, rows, formatting_func=text)
        found = [{k: row[k] for k in ("input_ids", "labels")} for row in trainer.train_dataset]
        assert found == expected
    with pytest.raises(UserError, match="formatting_func returned a list"):
        trainer_of(model, tmp_path, formatting_func=lambda row: [row["prompt"]])
    with pytest.raises(UserError, match="formatting_func makes texts"):
        trainer_of(model, tmp_path, formatting_func=text, completion_only_loss=True)


# --- settings that change data ----------------------------------------------------------------


def test_each_setting_of_the_data_does_what_it_says(model: Any, tmp_path: Path) -> None:
    plain, long = ids_of(ROWS), 25

    def lengths(part: Any) -> list[int]:
        return [len(row["input_ids"]) for row in part]

    def made(rows: Any = ROWS, **settings: Any) -> LiftTrainer:
        return trainer_of(model, tmp_path, rows, **settings)

    assert list(made(dataset_num_proc=2).train_dataset) == plain
    shuffled = list(made(shuffle_dataset=True).train_dataset)
    assert shuffled != plain
    assert sorted(map(str, shuffled)) == sorted(map(str, plain))
    assert max(lengths(made(max_length=9).train_dataset)) == 9
    assert max(lengths(made(max_length=None).train_dataset)) == long
    with pytest.warns(FutureWarning, match="keep_end"):
        ended = made(max_length=9, truncation_mode="keep_end").train_dataset
    assert [row["input_ids"] for row in ended] == [row["input_ids"][-9:] for row in plain]

    total = sum(lengths(plain))
    for strategy in ("bfd", "bfd_split", "wrapped"):
        packed = made(packing=True, packing_strategy=strategy, max_length=long).train_dataset
        assert sum(lengths(packed)) == total, strategy
        assert len(packed) < len(ROWS)
        made(packing=True, packing_strategy=strategy, max_length=long).train()
    cut = made(packing=True, max_length=10).train_dataset
    assert sum(lengths(cut)) == sum(min(10, n) for n in lengths(plain))

    both = {"eval_dataset": ROWS, "packing": True}
    assert len(made(**both).eval_dataset) < len(ROWS)
    assert len(made(**both, eval_packing=False).eval_dataset) == len(ROWS)
    batch = next(iter(made(pad_to_multiple_of=16).get_train_dataloader()))
    assert batch["input_ids"].shape[1] % 16 == 0
    free = made(padding_free=True, max_length=None)
    batch = next(iter(free.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1
    free.train()

    ready = Dataset.from_list(plain)
    skipped = made(ready, dataset_kwargs={"skip_prepare_dataset": True}, max_length=4)
    assert list(skipped.train_dataset) == plain
    with pytest.raises(UserError, match="is not tokenized"):
        made(dataset_kwargs={"skip_prepare_dataset": True})


def test_packs_of_prompts_alone_are_dropped_and_said(
    model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "p" * 64, "completion": "abc"}]
    for strategy in ("bfd_split", "wrapped"):
        caplog.clear()
        trainer = trainer_of(
            model, tmp_path, rows, packing=True, packing_strategy=strategy, max_length=16
        )
        assert [len(row["labels"]) for row in trainer.train_dataset] == [4]
        assert "train: 4 of 5 packs have no token to train on and are dropped." in caplog.text
        trainer.train()
        assert not trainer.guard.skipped


def test_rows_that_are_packed_already_keep_their_borders(model: Any, tmp_path: Path) -> None:
    packed = trainer_of(model, tmp_path, packing=True, max_length=24).train_dataset
    again = trainer_of(model, tmp_path, packed, padding_free=True, max_length=None).train_dataset
    assert list(again) == list(packed)
    assert "seq_lengths" in again.column_names
    with pytest.raises(UserError, match=r"is packed \(it has seq_lengths\), and 9 tokens"):
        trainer_of(model, tmp_path, packed, max_length=9)


# --- the loss of an evaluation ----------------------------------------------------------------


@torch.no_grad()
def oracle(model: Any, rows: Any) -> tuple[float, float]:
    """Mean loss and accuracy over all trained tokens, one row at a time."""
    losses, right = [], []
    for row in ids_of(rows):
        labels = torch.tensor(row["labels"])[1:]
        logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1]
        losses.append(F.cross_entropy(logits, labels, reduction="none")[labels != -100])
        right.append((logits.argmax(-1) == labels)[labels != -100].float())
    return float(torch.cat(losses).mean()), float(torch.cat(right).mean())


@pytest.mark.parametrize("loss", ["tiled", "trl"])
def test_the_loss_of_an_evaluation_is_a_mean_over_tokens(
    model: Any, tmp_path: Path, loss: str
) -> None:
    other = [{"prompt": "a", "completion": "b" * n} for n in (1, 40)]
    wanted = {"one": oracle(model, ROWS), "two": oracle(model, other)}
    for size in (1, 2, 7):
        trainer = trainer_of(
            model,
            tmp_path,
            per_device_eval_batch_size=size,
            eval_dataset={"one": ROWS, "two": Dataset.from_list(other)},
        )
        if loss == "trl":
            trainer._loss, trainer.data_collator = None, trainer.data_collator.collator
        found = trainer.evaluate()
        for name, (mean, accuracy) in wanted.items():
            assert found[f"eval_{name}_loss"] == pytest.approx(mean, rel=1e-5)
            (logged,) = [log for log in trainer.state.log_history if f"eval_{name}_loss" in log]
            assert logged["eval_mean_token_accuracy"] == pytest.approx(accuracy, rel=1e-5)
        assert trainer.evaluate(other)["eval_loss"] == pytest.approx(wanted["two"][0], rel=1e-5)


def test_packed_or_free_of_padding_the_loss_is_the_same(model: Any, tmp_path: Path) -> None:
    mean = oracle(model, ROWS)[0]
    settings: list[dict[str, Any]] = [
        {"packing": True},
        {"packing": True, "packing_strategy": "bfd_split"},
        {"packing": True, "eval_packing": False},
        {"padding_free": True, "max_length": None},
    ]
    for changes in settings:
        trainer = trainer_of(
            model, tmp_path, eval_dataset=ROWS, per_device_eval_batch_size=2, **changes
        )
        assert trainer.evaluate()["eval_loss"] == pytest.approx(mean, rel=1e-4), changes
        again = trainer.evaluate({"a": ROWS, "b": CHATS})  # which TRL prepares twice
        assert again["eval_a_loss"] == pytest.approx(mean, rel=1e-4), changes


def test_the_best_checkpoint_is_chosen_by_it(model: Any, tmp_path: Path) -> None:
    trainer = trainer_of(
        model,
        tmp_path,
        eval_dataset=ROWS,
        per_device_eval_batch_size=2,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="best",
        metric_for_best_model="eval_loss",
        learning_rate=0.0,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(oracle(model, ROWS)[0], rel=1e-5)


# --- streams ----------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", [False, True], ids=["rows", "packed"])
@pytest.mark.parametrize("size", [1, 3])
def test_all_tokens_of_a_stream_are_trained_and_evaluated(
    model: Any, tmp_path: Path, size: int, packing: bool
) -> None:
    """Libraries cut the tensors of a stream's batches by rows."""
    found = []
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    for rows, measured in ((ROWS, ROWS), (ROWS, stream), (stream, stream)):
        trainer = trainer_of(
            model,
            tmp_path,
            rows,
            eval_dataset=measured,
            packing=packing,
            train_sampling_strategy="sequential",
            per_device_train_batch_size=size,
            per_device_eval_batch_size=size,
            learning_rate=0.0,
            logging_steps=1,
        )
        evaluated = trainer.evaluate()["eval_loss"]
        trainer.train()
        (step,) = [entry for entry in trainer.state.log_history if "grad_norm" in entry]
        found.append((evaluated, step["loss"], step["grad_norm"]))
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
