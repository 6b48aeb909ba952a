"""A run whose MLPs and norms go over their tokens in pieces: the same loss, and the memory that was
planned."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from families import config_of
from sweeps import swept
from tiny import make_checkpoint_of

from leanlift import UserError
from leanlift.model import lifted
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.run import RunResult
from leanlift.training.screens import QuietScreen

BASES = ("llama", "phi3, fused", "gemma2", "qwen3")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "streamed": {"stream_base": True},
    "all streamed": {
        "stream_base": True,
        "stream_state": True,
        "optim_in_backward": True,
        "max_grad_norm": 0.0,
    },
    "kept": {"gradient_checkpointing": False},
    "in backward": {"optim_in_backward": True, "max_grad_norm": 0.0},
    "in bf16": {"dtype": "bfloat16"},
}

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 64)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 128)
    monkeypatch.setattr("leanlift.layers.tiled_norms.PIECE_BYTES", 64 * 64 * 4)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, tuple[Path, Path]] = {}

    def of(family: str) -> tuple[Path, Path]:
        if family not in made:
            config = config_of(
                family, num_hidden_layers=4, max_position_embeddings=1024, intermediate_size=512
            )
            path = make_checkpoint_of(config, tmp_path_factory.mktemp("base") / "base")
            rows = path.parent / "rows.jsonl"
            rows.write_text(json.dumps({"text": "1 and 2 is 3 " * 512}) + "\n", encoding="utf-8")
            made[family] = path, rows
        return made[family]

    return of


def trained(places: tuple[Path, Path], output: Path, **more: Any) -> RunResult:
    known = RunArguments.__dataclass_fields__
    args = RunArguments(
        model_name_or_path=str(places[0]), dataset_name=str(places[1]), selector="magnitude",
        values_dtype="bfloat16", **{key: value for key, value in more.items() if key in known},
    )  # fmt: skip
    loop = {key: value for key, value in more.items() if key not in known}
    sft = LiftSFTConfig(
        output_dir=str(output), use_cpu=True, bf16=False, max_steps=2, save_strategy="no",
        per_device_train_batch_size=1, disable_tqdm=True, max_length=600,
        **{"optim": "sparse_adamw_8bit", **loop},
    )  # fmt: skip
    return run(args, sft, screen=QuietScreen(), plan=lambda rows: plan_of(args, sft, False, rows))


@pytest.mark.parametrize("setting", swept(list(SETTINGS), "streamed"))
@pytest.mark.parametrize("family", swept(BASES, "llama"))
def test_a_run_peaks_where_it_was_planned(
    family: str, setting: str, places, tmp_path: Path
) -> None:
    reports = []
    for tiled in (False, True):
        output = tmp_path / str(tiled)
        reports.append(trained(places(family), output, tiled_mlp=tiled, **SETTINGS[setting]).memory)
    whole, tiled = (report.phases["train"].tensors for report in reports)
    assert reports[1].plan["phases"]["train"] == pytest.approx(tiled, rel=0.05)
    static = sum(v for k, v in reports[1].categories.items() if "activations" not in k)
    if family == "gemma2":  # its capped attention is the peak: [heads, tokens, tokens]
        assert tiled <= whole
    else:
        assert tiled - static < 0.75 * (whole - static), "what is left is worth it"


def test_a_model_without_mlps_to_tile_is_refused_before_anything_is_loaded(
    places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["leanlift.training.run"], "load_model", None)
    _, rows = places("llama")
    base = make_checkpoint_of(config_of("qwen3, experts"), tmp_path / "experts")
    with pytest.raises(UserError, match=r"no MLP of this Qwen3Moe.*leave out tiled_mlp"):
        trained((base, rows), tmp_path / "out", tiled_mlp=True)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["llama", "phi3, fused"])
def test_streamed_or_not_pieces_learn_the_same(family: str, places, tmp_path: Path) -> None:
    files = []
    for streamed in (False, True):
        output = tmp_path / str(streamed)
        told = {**SETTINGS["in backward"], "tiled_mlp": True, "refresh_interval": 1}
        trained(places(family), output, **told, stream_base=streamed, stream_state=streamed)
        files.append((output / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_a_run_takes_pieces_of_the_length_that_was_asked_for(places, tmp_path: Path) -> None:
    result = trained(places("llama"), tmp_path, tiled_mlp=True, mlp_tokens=300)
    mlps = [m.mlp for m in lifted(result.model).modules() if hasattr(m, "mlp")]
    assert [mlp.forward.args[1].tokens for mlp in mlps] == [300] * 4
    assert result.memory.plan["holds_for"]["mlp_tokens"] == 300
    assert result.memory.phases["train"].tensors == pytest.approx(
        result.memory.plan["phases"]["train"], rel=0.05
    )
    with pytest.raises(UserError, match="set both, or leave mlp_tokens out"):
        trained(places("llama"), tmp_path, mlp_tokens=300)
    with pytest.raises(UserError, match="expected mlp_tokens as a whole number, 64 or more"):
        trained(places("llama"), tmp_path, tiled_mlp=True, mlp_tokens=1)
