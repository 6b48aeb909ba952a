"""The command line as a user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from command import complaint
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint
from transformers import AutoModelForCausalLM

import leanlift
from leanlift.cli import build_parser, main
from leanlift.cli.settings import build_parser as settings_parser
from leanlift.cli.settings import parse_train
from leanlift.training import RunArguments

OWN_OPTIONS = {
    "method",
    "reward_funcs",
    "model_name_or_path",
    "model_revision",
    "dataset_name",
    "dataset_split",
    "datasets",
    "streaming",
    "formatting_func",
    "eval_dataset_name",
    "eval_dataset_split",
    "keep_dataset_name",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "dtype",
    "attn_implementation",
    "density",
    "rank_budget",
    "approx_rank",
    "refresh_interval",
    "refresh_margin",
    "retired_limit",
    "values_dtype",
    "quantize_embeddings",
    "embedding_on_cpu",
    "stream_base",
    "stream_state",
    "tiled_mlp",
    "fused_elementwise",
    "mlp_tokens",
    "ops",
    "snapshot",
    "selector",
    "calibration_rows",
    "block",
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "trainable_token_indices",
    "density_pattern",
    "selection_seed",
    "selection_tile_mib",
    "merged_dir",
    "merge_onto",
    "log_format",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("cli") / "base", dtype=torch.float16)


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"instruction": f"say {i}", "input": "", "output": str(i)}) + "\n"
            for i in range(12)
        )
    )
    settings = {
        "model_name_or_path": str(base),
        "dataset_name": str(rows),
        "output_dir": str(tmp_path / "run"),
        "approx_rank": 8,
        "refresh_interval": 2,
        "learning_rate": "2e-3",
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "max_length": 200,
        "per_device_train_batch_size": 2,
        "disable_tqdm": True,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_train_report_export(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, merged = tmp_path / "run", tmp_path / "merged"
    assert main(["train", "--config", str(config), "--merged_dir", str(merged)]) == 0
    out = capsys.readouterr().out
    assert f"adapter     {run} (" in out
    assert f"merged      {merged} (" in out
    assert f"leanlift report {run}" in out
    report = json.loads((run / "memory.json").read_text())
    assert list(report["phases"]) == ["load", "select", "train", "export"]
    assert all(peak["tensors"] > 0 for peak in report["phases"].values())
    assert sum(report["categories"].values()) == report["phases"]["train"]["tensors"]
    assert report["categories"]["activations and workspace"] > 0
    assert report["categories"]["gradients"] == report["categories"]["values"]

    assert main(["report", str(run)]) == 0
    assert "optimizer state" in capsys.readouterr().out
    again = tmp_path / "again"
    argv = ["export", str(run), str(again), "--onto", "quantized", "--dtype", "bfloat16"]
    assert main([*argv, "--verify"]) == 0
    out = capsys.readouterr().out
    assert "14 matrices merged onto the dequantized weights" in out
    assert "Verified: logits differ by" in out  # on the rows that run.json names
    assert "| data | rows.jsonl |" in (again / "README.md").read_text()
    assert AutoModelForCausalLM.from_pretrained(again).dtype == torch.bfloat16


@pytest.mark.thorough
def test_a_run_goes_on_where_it_stopped(config: Path, tmp_path: Path, unplanned: None) -> None:
    import shutil

    run = tmp_path / "run"
    assert main(["train", "--config", str(config)]) == 0
    whole = load_file(run / "adapter_model.safetensors")
    shutil.rmtree(run / "checkpoint-4")
    assert main(["train", "--config", str(config), "--resume_from_checkpoint", "true"]) == 0
    resumed = load_file(run / "adapter_model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize(
    "changes",
    [
        ["--selector", "gradient", "--refresh_interval", "0", "--calibration_rows", "3"],
        ["--block", "4", "--target_modules", "attention", "--density", "0.2"],
    ],
    ids=["gradient", "blocks"],
)
def test_other_selections_train_too(
    config: Path, tmp_path: Path, changes: list[str], unplanned: None
) -> None:
    assert main(["train", "--config", str(config), *changes]) == 0
    report = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert any(note.startswith("selection: ") for note in report["notes"])


def test_flags_override_the_file(config: Path) -> None:
    args, sft = parse_train(
        ["--config", str(config), "--learning_rate", "1e-4", "--density", "0.1"]
    )
    assert (sft.learning_rate, args.density, args.approx_rank, sft.max_steps) == (1e-4, 0.1, 8, 4)
    assert parse_train(["--config", str(config)])[1].learning_rate == 2e-3
    argv = ["--config", str(config), "--target_modules", "q_proj", "v_proj"]
    assert parse_train(argv)[0].lift_config().target_modules == ("q_proj", "v_proj")
    argv = ["--config", str(config), "--target_modules", "mlp"]
    assert parse_train(argv)[0].lift_config().target_modules == "mlp"
    argv = ["--config", str(config), "--density_pattern", '{"down_proj": 0.1}']
    assert parse_train(argv)[0].lift_config().density_pattern == {"down_proj": 0.1}
    config.write_text(config.read_text() + "density_pattern:\n  up_proj: 0.2\n")
    args, _ = parse_train(["--config", str(config)])
    assert args.lift_config().density_pattern == {"up_proj": 0.2}


def test_the_options_are_a_reviewed_set() -> None:
    assert set(RunArguments.__dataclass_fields__) == OWN_OPTIONS
    commands = build_parser()._subparsers
    assert commands is not None
    (choices,) = [action.choices for action in commands._group_actions]
    assert set(choices or ()) == {
        "demo",
        "init",
        "plan",
        "train",
        "eval",
        "chat",
        "serve",
        "export",
        "combine",
        "push",
        "info",
        "report",
        "doctor",
    }


def test_help_is_short_and_help_all_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    texts = {}
    for flag in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            main(["train", flag])
        assert stop.value.code == 0
        texts[flag] = capsys.readouterr().out
    assert "--density VALUE" in texts["--help"]
    assert "--ddp_backend" not in texts["--help"]
    assert "--ddp_backend" in texts["--help_all"]
    assert len(texts["--help"].splitlines()) < 130
    assert all(action.help for action in settings_parser("train")._actions)


def test_version_and_help_start_without_heavy_imports() -> None:
    code = "import sys, leanlift.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'transformers', 'bitsandbytes'} & set(sys.modules)"
    for flag in ("--version", "--help"):
        done = run_python("-c", code, flag)
        assert done.returncode == 0, done.stderr
        assert (
            "leanlift " + leanlift.__version__ if flag == "--version" else "demo"
        ) in done.stdout


def test_config_mistakes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def changed(text: str) -> str:
        path = tmp_path / "changed.yaml"
        path.write_text(config.read_text() + text)
        return complaint(capsys, "train", "--config", str(path))

    assert "unknown key 'learning_rat': did you mean learning_rate?" in changed("learning_rat: 1\n")
    assert "density as a number in (0, 1]" in changed("density: 2\n")
    assert "seed cannot be 'many'" in changed("seed: many\n")
    assert "not valid YAML" in changed("a: [\n")
    assert "does not exist" in complaint(capsys, "train", "--config", str(tmp_path / "none.yaml"))
    assert "nf4 or fp4" in changed("bnb_4bit_quant_type: int3\n")
    assert "expected a mapping such as" in changed("density_pattern: dense\n")
    assert "refresh_interval=0 with it" in changed("selector: gradient\n")
    assert "merge_onto" in changed("merge_onto: sideways\n")
    assert "auto, rich, plain, json; got 'loud'" in changed("log_format: loud\n")
    assert "already exists" in changed(f"merged_dir: {tmp_path}\n")
    assert "these settings do not work" in changed("padding_free: true\n")
    assert "--no_such_flag" in complaint(
        capsys, "train", "--config", str(config), "--no_such_flag", "1"
    )


def test_base_mistakes(
    base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_base(name: str | Path) -> str:
        argv = ["train", "--config", str(config), "--model_name_or_path", str(name)]
        message = complaint(capsys, *argv)
        assert not (tmp_path / "run").exists()
        return message

    assert "does not exist" in with_base(tmp_path / "nowhere")
    assert "cannot be loaded" in with_base("nobody/no-such-model")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "has no config.json" in with_base(empty)
    import shutil

    half = tmp_path / "half"
    shutil.copytree(base, half)
    weights = half / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert "truncated or only half downloaded" in with_base(half)
    weights.unlink()
    assert "holds no checkpoint" in with_base(half)
    weights.write_bytes(whole)
    settings = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**settings, "model_type": "martian"}))
    assert "martian" in with_base(half)
    (half / "config.json").write_text(json.dumps(settings))
    (half / "tokenizer.json").unlink()
    (half / "tokenizer_config.json").unlink()
    assert "cannot be loaded" in with_base(half)


def test_output_mistakes(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "precious").write_text("keep")
    assert "is not empty" in complaint(capsys, "train", "--config", str(config))
    argv = ["train", "--config", str(config), "--resume_from_checkpoint", "true"]
    assert "no whole checkpoint" in complaint(capsys, *argv)
    assert [path.name for path in run.iterdir()] == ["precious"]


def test_export_and_report_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "does not exist: expected what save_adapter" in complaint(
        capsys, "export", str(tmp_path / "none"), str(tmp_path / "out")
    )
    (tmp_path / "empty").mkdir()
    assert "is no leanlift adapter" in complaint(
        capsys, "export", str(tmp_path / "empty"), str(tmp_path / "out")
    )
    assert "holds no memory.json" in complaint(capsys, "report", str(tmp_path))
    with pytest.raises(leanlift.UserError):
        main(["--debug", "report", str(tmp_path)])


def test_nan_weights_end_a_run_with_one_sentence(
    base: Path, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    argv = ["train", "--config", str(config), "--model_name_or_path", str(broken)]
    assert "NaN or infinite weights" in complaint(capsys, *argv, "--load_in_4bit", "false")


def test_info_says_what_an_adapter_holds(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tiny import load

    from leanlift import LiftConfig, get_lift_model, save_adapter
    from leanlift.model import lift_layers

    model = get_lift_model(load(base), LiftConfig(density=0.1, approx_rank=4), progress=False)
    layers = lift_layers(model)
    name = list(layers)[5]
    layers[name].values.data[3] = -2.5
    save_adapter(model, tmp_path / "adapter")
    assert main(["info", str(tmp_path / "adapter"), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["entries"] == sum(layer.index.count for layer in layers.values())
    found = {module["module"]: module for module in data["modules"]}
    assert set(found) == set(layers)
    assert found[name]["largest"] == found[name]["norm"] == 2.5
    assert abs(data["density"] - 0.1) < 0.01
    assert main(["info", str(tmp_path / "adapter")]) == 0
    text = capsys.readouterr().out
    assert str(base) in text
    assert text.split("─\n")[1].startswith(name)
    assert "no leanlift adapter" in complaint(capsys, "info", str(base))
