"""What `leanlift plan` shows, writes and draws."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import ROOT
from shapes import LLAMA_3_8B, QWEN_2_5_7B, SMALL, write_config
from snapshots import assert_screen
from sweeps import swept

from leanlift import UserError
from leanlift.cli import main
from leanlift.cli.settings import parse_train, read_command
from leanlift.defaults import command_defaults
from leanlift.measure import picture
from leanlift.measure.picture import check_picture, draw
from leanlift.plan import MOMENTS, format_plan
from leanlift.plan.screen import TERMS, label
from leanlift.training import plan_of

EXAMPLES = ROOT / "examples"
GIB = 2**30


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    write_config(LLAMA_3_8B, place / "Llama-3-8B")
    write_config(QWEN_2_5_7B, place / "Qwen2.5-7B")
    return place


def of(model: Path, *more: str) -> Any:
    args, sft = parse_train(["--model_name_or_path", str(model), "--dataset_name", "r", *more])
    return plan_of(args, sft, cuda=True)


@pytest.mark.thorough
def test_the_screen_of_a_plan(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model_name_or_path", str(models / "Llama-3-8B")]) == 0
    assert_screen(capsys.readouterr().out, "plan")


@pytest.mark.thorough
def test_fit_says_what_it_changed_and_its_file_is_taken_as_it_is(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "run.yaml"
    argv = ["--model_name_or_path", str(models / "Llama-3-8B"), "--dataset_name", "my.json"]
    argv += ["--max_length", "2048", "--seed", "3"]
    assert main(["plan", *argv, "--fit", "8GB", "--save", str(place)]) == 0
    assert_screen(capsys.readouterr().out, "plan-fit")
    assert_screen(
        place.read_text(), "plan-fit-yaml", {str(models): "MODELS", str(place): "run.yaml"}
    )
    keys = yaml.safe_load(place.read_text())
    assert keys.items() >= {"max_length": 2048, "seed": 3, "quantize_embeddings": True}.items()
    args, sft = parse_train(["--config", str(place)])
    assert plan_of(args, sft, cuda=True).fits(8)
    assert main(["plan", *argv, "--save", str(place)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.thorough
def test_json_is_the_plan_and_what_was_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = write_config(SMALL, tmp_path / "small")
    flags = ["--max_length", "64", "--approx_rank", "8", "--eval_dataset_name", "rows.json"]
    chosen = {"exclude_modules": ["o_proj"], "modules_to_save": ["q_proj"],
              "trainable_token_indices": [5, 7], "density_pattern": {"k_proj": 0.5}}  # fmt: skip
    for name, value in chosen.items():
        flags += [f"--{name}", *(map(str, value) if type(value) is list else [json.dumps(value)])]
    flags += ["--refresh_interval", "9", "--optim", "adamw_torch", "--density", "0.9"]
    card = f"{0.999 * of(small, *flags).needed / GIB}GB"
    argv = ["plan", "--model_name_or_path", str(small), "--json", *flags, "--fit", card]
    assert main(argv) == 0
    data = json.loads(capsys.readouterr().out)
    documented = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    for key in (*data, *data["holds_for"], *data["categories"], *data["phases"], *data["step"]):
        assert f"`{key}`" in documented, f"docs/plan.md has no {key}"
    assert {key: data["holds_for"][key] for key in chosen} == chosen
    assert [change["keys"] for change in data["changed"]] == [{"optim": "sparse_adamw_8bit"}]
    assert data["needed"] == data["peak"] + data["context"]
    assert data["peak_moment"] in MOMENTS


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "expected"), swept([("Llama-3-8B", 8.2), ("Qwen2.5-7B", 7.9)], ("Llama-3-8B", 8.2))
)
def test_defaults_are_the_lean_ones(models: Path, name: str, expected: float) -> None:
    """What the README's table says of the first column; and within seconds."""
    begun = time.process_time()
    plan = of(models / name)
    assert plan.peak / GIB == pytest.approx(expected, abs=0.1)
    held = plan.holds_for
    assert (held["optim"], held["values_dtype"]) == ("sparse_adamw_8bit", "bfloat16")
    assert held["per_device_train_batch_size"] == 1
    assert held["gradient_accumulation_steps"] == 8
    assert held["gradient_checkpointing"]
    assert time.process_time() - begun < 6, "it took 2 s where this was written"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"optim": "sparse_adamw_8bit", "values_dtype": "bfloat16",
              "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}),
        ({"optim": "adamw_torch"}, {"values_dtype": "float32"}),
        ({"optim": "sparse_adamw"}, {"values_dtype": "bfloat16"}),
        ({"fp16": True}, {"optim": "adamw_torch", "values_dtype": "float32"}),
        ({"values_dtype": "float32"}, {"optim": "sparse_adamw_8bit"}),
        ({"per_device_train_batch_size": 4}, {"optim": "sparse_adamw_8bit"}),
        ({"gradient_accumulation_steps": 4}, {"per_device_train_batch_size": 1}),
        ({"optim_in_backward": True}, {"per_device_train_batch_size": 1}),
        ({"eval_dataset_name": "rows"}, {"eval_strategy": "epoch"}),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_said_decides_what_is_not(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = command_defaults(given)
    assert found.items() >= expected.items()
    assert not found.keys() & given.keys()
    batch = {"per_device_train_batch_size", "gradient_accumulation_steps"}
    if batch & given.keys() or "optim_in_backward" in given:
        assert "gradient_accumulation_steps" not in found, "one size leaves the other at 1"


@pytest.mark.thorough
def test_the_first_recipe_is_for_anyone_and_fits_12_gb(models: Path) -> None:
    path = EXAMPLES / "qwen2.5_7b.yaml"
    given = read_command("plan", ["--config", str(path)]).given
    assert given["model_name_or_path"] == "Qwen/Qwen2.5-7B"  # open to all
    plan = of(models / "Qwen2.5-7B", "--config", str(path))
    assert plan.fits(12)
    assert not plan.fits(8)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_taken(path: Path) -> None:
    args, sft = parse_train(["--config", str(path), "--use_cpu", "true"])
    args.lift_config()
    assert sft.output_dir


def screen_of(**changes: Any) -> tuple[dict[str, Any], list[str]]:
    """A plan with some bytes, and its screen."""
    categories = dict.fromkeys(
        ("base weights", "embeddings and head", "norms and other", "index", "values",
         "retired entries", "gradients", "optimizer state", "scratch",
         "activations and workspace"), 0,
    )  # fmt: skip
    categories |= {"base weights": 3 * GIB, "index": GIB, **changes.pop("categories", {})}
    train = sum(categories.values())
    plan = {
        "model": "some/model", "categories": categories, "entries": 10**8, "weights": 10**9,
        "phases": {"train": train}, "peak": train, "peak_phase": "train",
        "peak_moment": "backward pass", "step_moment": "backward pass", "context": GIB // 2,
        "needed": train + GIB // 2, "notes": [],
        "holds_for": {
            "per_device_train_batch_size": 1, "max_length": 512, "trained_tokens": None,
            "padded": False, "gradient_accumulation_steps": 1, "base": "nf4",
            "bnb_4bit_use_double_quant": True, "dtype": "bfloat16", "values_dtype": "bfloat16",
            "optim": "sparse_adamw_8bit", "gradient_checkpointing": True,
            "activation_offloading": False, "optim_in_backward": False,
            "quantize_embeddings": False, "embedding_on_cpu": False, "stream_base": False,
            "tiled_mlp": False, "refresh_interval": 0,
            "per_device_eval_batch_size": 0, "cuda": True,
        },
        **changes,
    }  # fmt: skip
    return plan, format_plan(plan).splitlines()


@pytest.mark.parametrize("term", TERMS)
def test_what_is_not_there_is_neither_a_row_nor_explained(term: str) -> None:
    for nbytes in (0, GIB):
        _, lines = screen_of(categories={"index": 0, term: nbytes})
        assert sum(line.startswith(term) for line in lines) == (2 if nbytes else 0)
        assert all(len(line) <= 80 for line in lines)


def test_the_moment_of_the_peak_is_named() -> None:
    rest = {"activations and workspace": GIB}
    plan, lines = screen_of(
        categories=rest, peak_moment="optimizer's step", step_moment="optimizer's step"
    )
    assert label(plan, "activations and workspace") == "workspace of the optimizer's step"
    assert "The peak is in the optimizer's step." in " ".join(lines)
    assert not any(line.startswith("activations") for line in lines)
    phases = {"train": 5 * GIB, "evaluate": 7 * GIB}
    _, lines = screen_of(
        categories=rest, phases=phases, peak=7 * GIB, peak_phase="evaluate",
        peak_moment="evaluate", needed=7 * GIB,
    )  # fmt: skip
    assert any(line.startswith("more in an evaluation") and " 2 " in line for line in lines)


def test_a_line_per_card_says_what_is_left_or_missing() -> None:
    _, lines = screen_of(needed=int(7.5 * GIB))
    cards = [line.split("card  ")[1] for line in lines if " GB card" in line]
    assert cards == [
        "lacks 3.50 GiB", "lacks 1.50 GiB", "fits, 512 MiB free", "fits, 4.50 GiB free",
        "fits, 8.50 GiB free", "fits, 16.5 GiB free",
    ]  # fmt: skip


# --- the picture ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("no_such_dir/plan.png", "there is no directory"),
        ("plan.txt", "is no picture"),
        ("plan", "is no picture"),
        ("taken.png", "cannot be written"),
    ],
)
def test_a_picture_that_could_not_be_written_is_refused_first(
    name: str, said: str, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UserError, match=said):
        check_picture(tmp_path / name)
    monkeypatch.setattr("leanlift.cli.plan.plan_of", None)  # whoever plans fails
    argv = ["plan", "--model_name_or_path", str(models / "Qwen2.5-7B")]
    assert main([*argv, "--plot", str(tmp_path / name)]) == 2
    assert not (tmp_path / "no_such_dir").exists(), "no directory is made"


def test_a_picture_has_a_title_cards_and_no_empty_legend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure

    made: list[Figure] = []

    def figure(*args: Any, **options: Any) -> Figure:
        made.append(Figure(*args, **options))
        return made[-1]

    monkeypatch.setattr(picture, "_figure", lambda: figure)
    bars = {"planned": {"base weights": 4 * GIB, "index": 3 * GIB, "scratch": 0}}
    draw(bars, tmp_path / "plan.png", "Some model: its memory", context=GIB // 2)
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
    (axes,) = made[0].axes
    assert axes.get_title() == "Some model: its memory"
    assert [text.get_text() for text in made[0].legends[0].get_texts()] == ["base weights", "index"]
    assert [text.get_text() for text in axes.texts] == ["6 GB card", "8 GB card"]
    assert axes.get_yticklabels()[0].get_text() == "planned: 7.00 GiB"
    draw({"small": {"index": 2**20}}, tmp_path / "small.svg", "Small")
    assert not made[1].axes[0].texts, "no card is of the order of a MiB"
    assert made[1].axes[0].get_xlabel() == "MiB"
