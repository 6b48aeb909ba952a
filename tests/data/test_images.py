"""Rows with pictures where rows of text are wanted, and what a model that sees is asked with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
from seeing import make_seeing, rows_with_pictures
from towers import TEXT, TOWER, tokenizer_with

from leanlift import UserError
from leanlift.cli import main
from leanlift.data.images import load_processor
from leanlift.data.tokenizer import load_tokenizer
from leanlift.evaluation import evaluate
from leanlift.plan.auto import takes_images
from leanlift.rows.images import image_column, placeholders, text_alone, with_placeholders
from leanlift.rows.source import load_rows
from leanlift.training.own_loss import few_ids


def test_pictures_are_not_passed_over_where_text_is_measured_or_proposed_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = make_seeing(tmp_path / "base", "llava"), rows_with_pictures(tmp_path / "rows")
    with pytest.raises(UserError, match="has images, and what is measured here is text"):
        evaluate(None, load_tokenizer(base), load_rows(str(data)))
    assert main(["init", "--model", str(base), "--data", str(data), "--card", "8GB"]) == 2
    assert "settings are proposed for rows of text" in capsys.readouterr().err


@pytest.mark.thorough
def test_pictures_are_trained_on_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A dry run: rows are read, put through the processor, planned and found a place."""
    base, data = make_seeing(tmp_path / "base", "gemma3"), rows_with_pictures(tmp_path / "rows")
    flags = ["--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--dry_run"]
    places = ["--model_name_or_path", str(base), "--dataset_name", str(data)]
    assert main(["train", *places, "--output_dir", str(tmp_path / "run"), *flags]) == 0
    assert "all 14 trained matrices have a place" in capsys.readouterr().out
    assert "is not counted" not in caplog.text


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("XProcessor requires the Torchvision library but it was not found.\nMore", "torchvision"),
        ("Package `num2words` is required to run XProcessor.", "num2words"),
    ],
)
def test_a_package_that_a_processor_needs_is_named(
    said: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, **given: Any) -> Any:
        raise ImportError(said)

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", fails)
    with pytest.raises(UserError, match=rf"needs the package {words}: pip install {words}\.$"):
        load_processor(tmp_path)


def test_paths_are_meant_from_the_directory_of_their_file(tmp_path: Path) -> None:
    file = rows_with_pictures(tmp_path / "rows")
    assert load_rows(str(file))[0]["images"] == [str(tmp_path / "rows" / "0.png")]
    (tmp_path / "rows" / "odd.jsonl").write_text(json.dumps({"image": "none.png", "text": "a"}))
    assert load_rows(str(tmp_path / "rows" / "odd.jsonl"))[0]["image"] == "none.png"


def test_places_for_images_are_counted_and_made() -> None:
    turns: list[Any] = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert placeholders(turns) == 0
    made = with_placeholders(turns, 2)
    assert placeholders(made) == 2
    assert with_placeholders(made, 3) == made  # they are there
    assert made[1]["content"][2] == {"type": "text", "text": "q"}
    listed = [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
    assert placeholders(with_placeholders(listed, 1)) == 1
    assert placeholders(listed) == 0
    row = {"image": 1, "images": [2], "messages": made, "answer": "x"}
    texts = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert text_alone(row) == {"messages": texts, "answer": "x"}
    assert image_column(["text"]) is None


def test_the_template_of_a_processor_is_the_tokenizers_where_it_has_none(tmp_path: Path) -> None:
    tokenizer_with("<image>").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).chat_template is None
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "T"}))
    assert load_tokenizer(tmp_path).chat_template == "T"
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": 3}))
    assert load_tokenizer(tmp_path).chat_template is None


def test_what_a_model_is_tried_with_stands_for_text() -> None:
    config = transformers.LlavaConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": 32},
        vision_config={**TOWER, "model_type": "clip_vision_model"},
        image_token_index=10,
    )
    ids = few_ids(transformers.LlavaForConditionalGeneration(config))
    assert ids.shape == (2, 9)
    assert not {0, 1, 10} & set(ids.flatten().tolist())


def test_whether_a_base_takes_images_is_told_from_its_configuration(tmp_path: Path) -> None:
    transformers.LlamaConfig().save_pretrained(tmp_path / "text")
    transformers.Qwen2AudioConfig().save_pretrained(tmp_path / "sound")
    transformers.Qwen3_5Config().save_pretrained(tmp_path / "images")
    found = [takes_images(str(tmp_path / name)) for name in ("text", "sound", "images", "none")]
    assert found == [False, False, True, False]
