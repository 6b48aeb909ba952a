"""What `--verify` can be asked for, told before anything is merged."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import complaint
from tiny import load, make_checkpoint
from transformers import AutoModelForSequenceClassification

from leanlift import LiftConfig, get_lift_model, save_adapter


def test_what_could_not_be_verified_is_not_merged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = make_checkpoint(tmp_path / "base")
    lift = LiftConfig(selector="random", target_modules=("q_proj",))
    save_adapter(get_lift_model(load(base, "dense"), lift, progress=False), tmp_path / "adapter")
    stock = AutoModelForSequenceClassification.from_pretrained(base, pad_token_id=0)
    head = LiftConfig(**{**lift.to_dict(), "modules_to_save": ("score",)})
    save_adapter(get_lift_model(stock, head, progress=False), tmp_path / "classifier")
    rows, out = str(tmp_path / "none.json"), str(tmp_path / "out")
    for adapter, more, said in (
        ("adapter", [], "does not say which data it was trained on"),
        ("adapter", ["--data", rows], "none.json"),
        ("classifier", [], "adapter of a LlamaForSequenceClassification: --verify compares"),
    ):
        argv = ["export", str(tmp_path / adapter), out, "--verify", *more]
        assert said in complaint(capsys, *argv)
        assert not Path(out).exists()
