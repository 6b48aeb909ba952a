"""A run whose tokenizer needs more rows than its base has."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import (
    CHATS,
    HAVE,
    LIFT,
    ROWS,
    TOKENS,
    logits,
    make_tokens,
)
from tiny import load, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from leanlift import (
    LiftTrainer,
    UserError,
    get_lift_model,
)
from leanlift.cli import main
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.dry_run import dry_run
from leanlift.training.screens import QuietScreen


def settings(output: Path, **changes: Any) -> LiftSFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return LiftSFTConfig(**{**defaults, **changes})


@pytest.mark.thorough
def test_a_run_with_a_templates_tokens(
    base: Path,
    template: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHATS))

    def train(output: Path, resume: str | None = None, merged: Path | None = None) -> Any:
        args = RunArguments(
            str(base),
            str(data),
            approx_rank=4,
            refresh_interval=3,
            merged_dir=None if merged is None else str(merged),
            merge_onto="quantized",
        )
        sft = settings(output, chat_template_path=str(template), resume_from_checkpoint=resume)
        return run(args, sft).model.eval()

    model = train(tmp_path / "whole", merged=tmp_path / "merged")
    said = [line for line in caplog.messages if "get rows there" in line]
    assert len(said) == 1
    assert "brings 3 tokens" in said[0]
    assert ", ".join(TOKENS) in said[0]
    assert model.config.eos_token_id == HAVE + TOKENS.index("<|im_end|>")

    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == ROWS == stock.get_input_embeddings().weight.shape[0]
    assert stock.config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    difference = (logits(stock.eval()) - logits(model)).abs().max()
    assert difference <= 2e-3 * logits(model).abs().max()  # fp16

    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = train(tmp_path / "cut", "true")
    assert torch.equal(logits(resumed), logits(model))
    for name, layer in lift_layers(resumed).items():
        assert torch.equal(layer.values, lift_layers(model)[name].values)

    capsys.readouterr()
    options = ["--adapter", str(tmp_path / "whole"), "--data", str(data), "--max_new_tokens", "3"]
    assert main(["eval", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * len(CHATS)


def test_a_trainer_asks_for_the_rows_that_a_tokenizer_needs(
    base: Path, template: Path, tmp_path: Path
) -> None:
    def build(model: Any, tokenizer: Any, rows: Any = CHATS, **changes: Any) -> LiftTrainer:
        sft = settings(tmp_path / "run", **changes)
        return LiftTrainer(model=model, args=sft, train_dataset=rows, processing_class=tokenizer)

    small = get_lift_model(load(base, "dense"), LIFT, progress=False)
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<more>"})
    used = make_tokens()
    used.eos_token = "</s>"
    for tokenizer, needed, changes in (
        (make_tokenizer(), ROWS, {"chat_template_path": str(template)}),
        (make_tokens(), HAVE + 2, {}),  # up to its end token
        (padded, HAVE + 1, {"rows": [{"text": "abc"}]}),
        (used, ROWS, {}),
    ):
        with pytest.raises(UserError, match=rf"embedding_rows={needed}\)"):
            build(small, tokenizer, **changes)
    assert small.get_input_embeddings().weight.shape[0] == HAVE

    model = get_lift_model(load(base, "dense"), LIFT, progress=False, embedding_rows=ROWS)
    build(model, make_tokenizer(), chat_template_path=str(template), save_strategy="no").train()
    assert model.config.vocab_size == ROWS


def test_a_head_that_grows_is_not_trained_whole_and_that_is_known_before_the_load(
    base: Path, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", None)  # whoever loads it fails
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    args = RunArguments(str(base), str(data), approx_rank=4, modules_to_save="lm_head")
    sft = settings(tmp_path / "run", chat_template_path=str(template))
    tied = bool(json.loads((base / "config.json").read_text())["tie_word_embeddings"])
    said = "tied to the embedding" if tied else f"grows to {ROWS} rows, and lm_head is in modules"
    for look in run, lambda args, sft: dry_run(args, sft, lambda _: None, QuietScreen()):
        with pytest.raises(UserError, match=said):
            look(args, sft)
    assert not (tmp_path / "run" / "adapter_config.json").exists()


@pytest.mark.thorough
def test_a_plan_says_that_it_does_not_count_the_rows(
    base: Path, template: Path, tmp_path: Path
) -> None:
    args = RunArguments(str(base), "rows.jsonl", approx_rank=4)
    for path, told in ((template, True), (template / "chat_template.jinja", False), (None, False)):
        sft = settings(tmp_path / "run", chat_template_path=path and str(path))
        notes = " ".join(plan_of(args, sft, cuda=False).notes)
        assert ("chat_template_path" in notes) == told
