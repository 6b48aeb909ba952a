"""`fused_elementwise` in a run: where it cannot be had that is said at once; where it can, it is
used, and planned."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from families import config_of
from tiny import make_checkpoint_of

from leanlift import UserError
from leanlift.layers.fused_glu import OurForward
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.screens import QuietScreen


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    wide = {"intermediate_size": 512, "max_position_embeddings": 1024, "num_hidden_layers": 4}
    place = make_checkpoint_of(config_of("qwen3", **wide), tmp_path_factory.mktemp("b") / "base")
    (place.parent / "rows.jsonl").write_text('{"text": "1 and 2 is 3"}\n', encoding="utf-8")
    return place


def told(base: Path, output: Path, **more: Any) -> tuple[RunArguments, LiftSFTConfig]:
    args = RunArguments(
        model_name_or_path=str(base), dataset_name=str(base.parent / "rows.jsonl"),
        selector="magnitude", fused_elementwise=True, **more,
    )  # fmt: skip
    sft = LiftSFTConfig(
        output_dir=str(output), use_cpu=True, bf16=False, max_steps=1, save_strategy="no",
        per_device_train_batch_size=1, disable_tqdm=True, max_length=600,
    )  # fmt: skip
    return args, sft


def test_without_a_gpu_it_is_refused_before_rows_are_read(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["leanlift.training.job"], "ready_rows", None)
    args, sft = told(base, tmp_path / "out")
    with pytest.raises(UserError, match="fused_elementwise needs a GPU"):
        run(args, sft, screen=QuietScreen())
    assert not (tmp_path / "out").exists()


def test_a_run_that_can_have_it_does(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = sys.modules["leanlift.training.job"]
    monkeypatch.setattr(job, "check_kernels", lambda cuda: None)
    args, sft = told(base, tmp_path / "out", tiled_mlp=True)
    result = run(args, sft, screen=QuietScreen())
    fused = [m for m in result.model.modules() if isinstance(vars(m).get("forward"), OurForward)]
    assert len(fused) == 4 * (1 + 4 + 1) + 1, "an attention, four norms and an MLP a block"


def test_a_card_needs_less_and_its_plan_says_so(base: Path, tmp_path: Path) -> None:
    args, sft = told(base, tmp_path)
    with_it = plan_of(args, sft, cuda=True)
    without = plan_of(replace(args, fused_elementwise=False), sft, cuda=True)
    assert with_it.holds_for["fused_elementwise"]
    assert with_it.phases["train"] < without.phases["train"]
