"""What settings change about a tokenizer is done before rows are converted, on every path."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command import complaint
from tiny import load, make_tokenizer
from tokenizers_of_all_kinds import CHATML, characters

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.data.tokenizer import load_tokenizer, prepare_tokenizer
from leanlift.data.tokens import Tokenization
from leanlift.training import LiftSFTConfig, RunArguments, run

CHATS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
ALPACA = [{"instruction": "q", "input": "", "output": "a"}]
TEMPLATE = (
    "{% for m in messages %}({{ m.role }}){{ m.content }}#{% endfor %}"
    "{% if add_generation_prompt %}(assistant){% endif %}"
)
"""Ends a turn in a token of its own, "#"."""


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "own.jinja"
    path.write_text(TEMPLATE)
    return path


def settings(output: Path, **changes: Any) -> LiftSFTConfig:
    return LiftSFTConfig(
        **{
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "max_steps": 1,
            "save_strategy": "no",
            "disable_tqdm": True,
            "per_device_train_batch_size": 1,
            **changes,
        }
    )


def trained_by_hand(base: Path, rows: Any, sft: LiftSFTConfig) -> tuple[Any, Any, str]:
    """Model, tokenizer and the first row's text of a directly constructed trainer, after train."""
    model = get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False)
    tokenizer = make_tokenizer()
    trainer = LiftTrainer(model=model, args=sft, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    return model, tokenizer, tokenizer.decode(trainer.train_dataset[0]["input_ids"])


def trained_by_run(base: Path, rows: Any, sft: LiftSFTConfig) -> tuple[Any, Any, str]:
    data = Path(sft.output_dir or "").parent / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts: list[str] = []

    def keep(trainer_model: Any, tokenizer: Any) -> None:
        from leanlift.data.dataset import token_rows

        made = token_rows(rows, Tokenization.of(tokenizer, sft))
        texts.append(tokenizer.decode(made.data[0]["input_ids"]))

    args = RunArguments(str(base), str(data), load_in_4bit=False, approx_rank=2)
    result = run(args, sft, before_training=keep)
    return result.model, result.tokenizer, texts[0]


@pytest.mark.parametrize("train", [trained_by_hand, trained_by_run], ids=["trainer", "run"])
@pytest.mark.parametrize("rows", [CHATS, ALPACA], ids=["chats", "alpaca"])
def test_a_template_and_an_end_token_hold_for_rows_model_and_saved_files(
    base: Path, template: Path, tmp_path: Path, train: Any, rows: Any
) -> None:
    sft = settings(tmp_path / "run", chat_template_path=str(template), eos_token="#")
    model, tokenizer, text = train(base, rows, sft)
    assert text == "(user)q#(assistant)a#"
    assert (sft.chat_template_path, sft.eos_token) == (str(template), "#")
    end, old = tokenizer.convert_tokens_to_ids("#"), 1
    assert tokenizer.eos_token_id == end
    assert model.config.eos_token_id == end
    assert model.generation_config.eos_token_id == [end, old]
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    if train is trained_by_run:
        saved = load_tokenizer(tmp_path / "run")
        assert (saved.chat_template, saved.eos_token) == (TEMPLATE, "#")


@pytest.mark.parametrize("train", [trained_by_hand, trained_by_run], ids=["trainer", "run"])
def test_a_tokenizer_without_pad_token(base: Path, tmp_path: Path, train: Any) -> None:
    other = tmp_path / "base"
    shutil.copytree(base, other)
    tokenizer = make_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(other)
    model, used, text = train(other, [{"text": "abc"}], settings(tmp_path / "run"))
    assert text == "abc</s>"
    assert used.pad_token_id == model.config.pad_token_id
    assert model.config.pad_token_id == model.generation_config.pad_token_id


def test_the_model_knows_the_end_token_before_it_is_trained(
    base: Path, template: Path, tmp_path: Path
) -> None:
    model = get_lift_model(load(base, "dense"), LiftConfig(approx_rank=2), progress=False)
    sft = settings(tmp_path, chat_template_path=str(template), eos_token="#")
    tokenizer = make_tokenizer()
    LiftTrainer(model=model, args=sft, train_dataset=CHATS, processing_class=tokenizer)
    end = tokenizer.convert_tokens_to_ids("#")
    assert (model.config.eos_token_id, model.generation_config.eos_token_id) == (end, [end, 1])


def tokenizer_with(tmp_path: Path, *tokens: str) -> str:
    """A tokenizer directory with a template that uses more tokens."""
    other = characters(CHATML.replace("[", "<x1>"))
    other.add_tokens(list(tokens))
    other.save_pretrained(tmp_path / "other")
    return str(tmp_path / "other")


def test_a_template_directory_brings_its_tokens_where_the_embedding_has_rows(
    base: Path, tmp_path: Path
) -> None:
    source, own = tokenizer_with(tmp_path, "<x1>", "<x2>"), make_tokenizer()
    rows = len(own) + 2
    prepared = prepare_tokenizer(
        make_tokenizer(), settings(tmp_path, chat_template_path=source), rows
    )
    assert prepared.convert_tokens_to_ids(["<x1>", "<x2>"]) == [rows - 2, rows - 1]
    assert prepared.chat_template == load_tokenizer(source).chat_template
    for path in (base,):  # its embedding has no room
        model = get_lift_model(load(path, "dense"), LiftConfig(approx_rank=2), progress=False)
        with pytest.raises(UserError, match=rf"adds <x1>, <x2>.*embedding_rows={rows}\)"):
            LiftTrainer(
                model=model,
                args=settings(tmp_path / "run", chat_template_path=source),
                train_dataset=CHATS,
                processing_class=make_tokenizer(),
            )
        assert model.get_input_embeddings().weight.shape[0] == rows - 2


def test_a_template_directory_does_not_resize_the_embedding(base: Path, tmp_path: Path) -> None:
    source = tokenizer_with(tmp_path)
    sft = settings(tmp_path / "run", chat_template_path=source)
    model, tokenizer, text = trained_by_hand(base, CHATS, sft)
    assert text.startswith("<x1>user]q</s>")
    assert model.get_input_embeddings().weight.shape[0] == len(make_tokenizer()) == len(tokenizer)


class Unloadable:
    """Stands for an Auto class where the base must not be loaded."""

    @staticmethod
    def from_pretrained(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the base was loaded")


def test_settings_that_cannot_be_had(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlift.training.base.auto_class", lambda *args: Unloadable)
    data = tmp_path / "rows.jsonl"
    data.write_text(json.dumps(CHATS[0]) + "\n")
    notes, broken, fine = (tmp_path / name for name in ("notes.txt", "broken.j2", "fine.jinja"))
    notes.write_text("x")
    broken.write_text("{% for m in %}")
    fine.write_text(TEMPLATE)
    make_tokenizer().save_pretrained(tmp_path / "bare")

    def refused(words: str, path: Any = fine, **changes: Any) -> None:
        with pytest.raises(UserError, match=words):
            sft = settings(tmp_path / "run", chat_template_path=path and str(path), **changes)
            run(RunArguments(str(base), str(data), load_in_4bit=False), sft)

    refused("is a chat, and the tokenizer has no chat template", None)
    refused("eos_token '<nope>' is no token", eos_token="<nope>")
    monkeypatch.setattr("leanlift.weights.grown.MOST_ADDED", 16)
    many = [f"<{i}>" for i in range(17)]
    refused(r"wants \d+ rows in an embedding that has", tokenizer_with(tmp_path, *many))
    refused("is no template", notes)
    refused("does not exist", tmp_path / "none.jinja")
    refused("has no chat template", tmp_path / "bare")
    refused("cannot be loaded", tmp_path / "nothing")
    refused("row 0 of the train dataset cannot be put into the chat template", broken)
    refused("packing needs a max_length", packing=True, max_length=None)
    refused("dataset_kwargs has skip_prepare_dataset alone", dataset_kwargs={"a": 1})
    refused("padding_free without packing", padding_free=True)
    refused("expected max_length as a whole number, at least 1", max_length=0)
    refused("packing_strategy 'best' is none of", packing=True, packing_strategy="best")
    refused("truncation_mode 'middle' is neither", truncation_mode="middle")
    refused("is not tokenized", dataset_kwargs={"skip_prepare_dataset": True})
    refused("needs a chat template with {% generation", assistant_only_loss=True)
    assert not (tmp_path / "run").exists()


def test_a_pad_token_of_ones_own(base: Path, tmp_path: Path) -> None:
    with pytest.warns(FutureWarning, match="pad_token"):
        sft = settings(tmp_path / "run", pad_token="~")
    model, tokenizer, _ = trained_by_hand(base, [{"text": "abc"}], sft)
    assert tokenizer.pad_token == "~"
    assert model.config.pad_token_id == tokenizer.convert_tokens_to_ids("~")


def test_rows_are_looked_at_before_the_base_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leanlift.training.base.auto_class", lambda *args: Unloadable)
    template = tmp_path / "strict.jinja"
    template.write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + TEMPLATE
    )
    system = {"role": "system", "content": "s"}
    data = tmp_path / "rows.jsonl"

    shutil.copytree(base, tmp_path / "chatty")
    shutil.copy(template, tmp_path / "chatty" / "chat_template.jinja")

    def refused(row: Any, command: str) -> str:
        data.write_text(json.dumps(CHATS[0]) + "\n" + json.dumps(row) + "\n")
        argv = [command, "--model_name_or_path", str(tmp_path / "chatty")]
        if command == "eval":
            return complaint(capsys, *argv, "--data", str(data))
        argv += ["--dataset_name", str(data), "--output_dir", str(tmp_path / "run")]
        return complaint(capsys, *argv)

    for command in ("train", "eval"):
        message = refused({"messages": [system, *CHATS[0]["messages"]]}, command)
        assert f"row 1 of the {command} dataset cannot be put into the chat template" in message
        assert "no system role" in message
        assert "row 1 " in refused({"messages": "x"}, command)


def test_tokenizers_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
    endless = make_tokenizer()
    endless.eos_token = None
    endless.save_pretrained(tmp_path / "endless")
    bare = load_tokenizer(tmp_path / "endless")
    with pytest.raises(UserError, match="endless has no end-of-sequence token"):
        Tokenization.of(bare)
    with pytest.raises(UserError, match="has no end-of-sequence token"):
        prepare_tokenizer(bare, settings(tmp_path))
    named = prepare_tokenizer(bare, settings(tmp_path, eos_token="#"))
    assert Tokenization.of(named).ends == {named.convert_tokens_to_ids("#")}
    (tmp_path / "endless" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(tmp_path / "endless")


def test_a_tokenizer_whose_files_do_not_agree_is_one_sentence() -> None:
    tokenizer = make_tokenizer()

    class Broken(type(tokenizer)):  # type: ignore[misc]
        def _encode_plus(self, *args: Any, **kwargs: Any) -> Any:
            raise Exception("Unk token `<unk>` not found in the vocabulary")

    tokenizer.__class__ = Broken
    how = Tokenization.of(tokenizer)
    with pytest.raises(UserError, match="cannot take a text apart: Unk token"):
        how({"text": "abc"}, "row 0")
