"""One declaration of each setting: as a flag, as a key of a file and in Python it is the same."""

from __future__ import annotations

import ast
import json
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import complaint
from tiny import make_checkpoint

import leanlift.cli
from leanlift import LiftConfig, UserError
from leanlift.cli.early import check_early
from leanlift.cli.options import options, run_options
from leanlift.cli.parsing import OWN, asks_for_help, read_flags, take_switch
from leanlift.cli.settings import parse_train, read_command
from leanlift.cli.train import resuming
from leanlift.run_arguments import RunArguments
from leanlift.settings import NUMBERS, brief, kind_of

BASIC = ["--model_name_or_path", "base", "--dataset_name", "rows.json"]
SETTINGS = {field.name: field for field in fields(LiftConfig)}

OTHER: dict[str, tuple[str, Any, Any]] = {
    "density": ("0.25", 0.25, 0.25),
    "rank_budget": ("8", 8, 8),
    "approx_rank": ("16", 16, 16),
    "refresh_interval": ("400", 400, 400),
    "refresh_margin": ("1e-1", 0.1, 0.1),
    "retired_limit": ("none", None, None),
    "selector": ("random", "random", "random"),
    "block": ("4", 4, 4),
    "target_modules": ("attention", "attention", "attention"),
    "exclude_modules": ("o_proj", "o_proj", ("o_proj",)),
    "modules_to_save": ("lm_head", "lm_head", ("lm_head",)),
    "trainable_token_indices": ("7", [7], (7,)),
    "density_pattern": ('{"up_proj": 0.5}', {"up_proj": 0.5}, {"up_proj": 0.5}),
    "values_dtype": ("float32", "float32", "float32"),
    "quantize_embeddings": ("yes", True, True),
    "selection_seed": ("-3", -3, -3),
    "selection_tile_mib": ("64", 64, 64),
}
"""Another value of each setting: as a flag's text, in YAML, in Python."""

NEVER: dict[str, tuple[Any, ...]] = {
    "density": (0, 1.5, -0.1, float("nan"), True, "many"),
    "rank_budget": (0, 1.5, True, "many"),
    "approx_rank": (0, 1.5, None),
    "refresh_interval": (-1, 0.5, None),
    "refresh_margin": (-0.1, float("inf"), None),
    "retired_limit": (-1, 1e308, float("nan"), "any"),
    "selector": ("best", 3, None),
    "block": (0, -4, None),
    "target_modules": (3, ["q_proj", 3], None),
    "exclude_modules": (3, ["q_proj", 3], {3}),
    "modules_to_save": (3, ["lm_head", 3], {3}),
    "trainable_token_indices": (-1, [3, 3], [1.5], ["x"], {3}),
    "density_pattern": (
        {"a": 2.0},
        {"a": "x"},
        {"a": 0.1, "b": 0},
        {3.0},
        "dense",
        "[" * 10**5,
        '{"a": 1' + "0" * 400 + "}",
    ),
    "values_dtype": ("float16", 16, None),
    "quantize_embeddings": (1, "perhaps", None),
    "selection_seed": (2**63, 0.5, None),
    "selection_tile_mib": (0, None),
}


LISTS = {"exclude_modules": "q_proj", "modules_to_save": "q_proj", "trainable_token_indices": 7}
"""Settings that list something, and of what."""


def in_file(place: Path, **settings: Any) -> list[str]:
    """The arguments that name a file of these settings, a new one each time."""
    file = place / f"{len(list(place.iterdir()))}.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return ["--config", str(file)]


# --- one declaration --------------------------------------------------------------------------


def test_every_setting_is_swept() -> None:
    assert set(OTHER) == set(NEVER) == set(SETTINGS)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_declared_whole(name: str) -> None:
    field = SETTINGS[name]
    default = field.default if field.default_factory is MISSING else field.default_factory()
    text = field.metadata["help"]
    assert kind_of(field).holds(default)
    assert "%" not in text, "argparse takes it for a format"
    assert 0 < len(brief(text)) <= 60
    assert " ".join(f"{name}: {text}".split()) in " ".join((LiftConfig.__doc__ or "").split())
    table = options()
    assert table is not None
    assert table[name].kind is run_options()[name].kind is kind_of(field)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_flag_a_key_and_an_argument_are_the_same(name: str, tmp_path: Path) -> None:
    text, written, value = OTHER[name]
    wanted = getattr(LiftConfig(**{name: value}), name)
    dashed = f"--{name.replace('_', '-')}"
    for argv in (
        [f"--{name}", text],
        [f"--{name}={text}"],
        [dashed, text],
        in_file(tmp_path, **{name: written}),
        in_file(tmp_path, **{name: text}),
        [*in_file(tmp_path, **{name: None}), f"--{name}", text],
        [f"--{name}", text, f"{dashed}={text}"],  # twice: the last one counts
    ):
        args = parse_train([*BASIC, *argv])[0]
        assert getattr(args, name) == getattr(args.lift_config(), name) == wanted
    assert getattr(RunArguments("b", "d", **{name: value}), name) == wanted


@pytest.mark.parametrize("name", SETTINGS)
def test_what_it_cannot_be_is_refused_everywhere(name: str, tmp_path: Path) -> None:
    for value in NEVER[name]:
        with pytest.raises(UserError, match=name):
            LiftConfig(**{name: value})
        with pytest.raises(UserError, match=name):
            RunArguments("base", "rows", **{name: value})
        if isinstance(value, set):
            continue
        for look in (parse_train, lambda argv: check_early("plan", argv)):
            with pytest.raises(UserError, match=name):
                look([*BASIC, *in_file(tmp_path, **{name: value})])
            if isinstance(value, (int, float, str)) and not isinstance(value, bool):
                if ("modules" in name and value == 3) or (name, value) == (
                    "quantize_embeddings",
                    1,
                ):
                    continue  # as texts they are a name and a switch
                with pytest.raises(UserError, match=name):
                    look([*BASIC, f"--{name}={value}"])


def test_nothing_is_none(tmp_path: Path) -> None:
    whole = ("rank_budget", "max_length", "save_total_limit")
    for name in (*whole, "retired_limit", "eval_steps", "hub_private_repo"):
        for text in ("none", "None", "null"):
            args, sft = parse_train([*BASIC, f"--{name}", text])
            assert getattr(args if name in SETTINGS else sft, name) is None
    with pytest.raises(UserError, match=r"0 or more .*or none; got -1"):
        parse_train([*BASIC, "--retired_limit", "-1"])
    assert parse_train([*BASIC, "--merged_dir", "none"])[0].merged_dir is None
    for argv in (["--density_pattern", "none"], in_file(tmp_path, density_pattern=None)):
        assert parse_train([*BASIC, *argv])[0].density_pattern == {}


# --- flags ------------------------------------------------------------------------------------


def test_the_options_that_are_no_settings_are_a_reviewed_set() -> None:
    found = {command: vars(read_flags(command, [], options() or {})[1]) for command in COMMANDS}
    assert {command: set(own) for command, own in found.items()} == COMMANDS
    assert set().union(*COMMANDS.values()) == set(OWN)


HELP = {"help", "help_all"}
COMMANDS = {
    "train": {"config", "fit", "dry_run"} | HELP,
    "plan": {"longest", "table", "config", "fit", "save", "plot", "json", "cpu", "card"} | HELP,
}

REFUSED: dict[str, tuple[str, list[str], str]] = {
    "abbreviated": ("train", ["--dens", "0.1"], "--dens is no option of leanlift train"),
    "abbreviated own": ("plan", ["--js"], "--js is no option of leanlift plan"),
    "of the other": ("train", ["--json"], "--json is no option of leanlift train"),
    "a value for a switch": ("plan", ["--json=yes"], "--json takes no value"),
    "a value for a dry run": ("train", ["--dry_run=1"], "--dry_run takes no value"),
    "no value": ("train", ["--seed"], "--seed needs a value"),
    "an option for a value": ("train", ["--output_dir", "--seed", "3"], "--output_dir needs a"),
    "an own option for a value": ("plan", ["--plot", "--json"], "--plot needs a value"),
    "nothing after =": ("plan", ["--fit="], "--fit needs a value"),
    "nothing for many": ("train", ["--target_modules"], "--target_modules needs a value"),
    "a word for a switch": ("train", ["--packing", "perhaps"], "expected true or false"),
    "a stray word": ("train", ["--seed", "3", "word"], "word stands alone"),
    "off what is off": ("train", ["--no_packing"], "--no_packing is no option"),
    "a value for off": ("train", ["--no_load_in_4bit=1"], "--no_load_in_4bit takes no value"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_flag_can_be(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, argv, message = REFUSED[case]
    assert message in complaint(capsys, command, *BASIC, *argv)
    with pytest.raises(UserError, match=message):
        read_command(command, [*BASIC, *argv])


TAKEN: dict[str, tuple[list[str], dict[str, Any]]] = {
    "equals": (["--seed=3"], {"seed": 3}),
    "dashes": (["--max-steps", "5"], {"max_steps": 5}),
    "negative": (["--max_steps", "-1"], {"max_steps": -1}),
    "last": (["--seed", "1", "--seed=2"], {"seed": 2}),
    "off": (["--no_load_in_4bit"], {"load_in_4bit": False}),
    "off and on": (["--no-load-in-4bit", "--load_in_4bit"], {"load_in_4bit": True}),
    "on": (["--packing"], {"packing": True}),
    "on before another": (["--packing", "--seed", "3"], {"packing": True, "seed": 3}),
    "many": (["--target_modules", "a", "b", "--seed", "3"], {"target_modules": ("a", "b")}),
    "a dash in a value": (["--output_dir=--json"], {"output_dir": "--json"}),
    "an option's name as a value": (["--run_name", "json"], {"run_name": "json"}),
    "debug of Trainer's": (["--debug", "underflow_overflow"], {}),
}


@pytest.mark.parametrize("case", TAKEN)
def test_what_a_flag_can_be(case: str) -> None:
    argv, wanted = TAKEN[case]
    table = options()
    assert table is not None
    early, own = read_flags("train", [*BASIC, *argv], table)
    late = read_command("train", [*BASIC, *argv])
    assert early.items() >= wanted.items()
    assert late.given.items() >= wanted.items()
    assert not own.dry_run


def test_debug_is_taken_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--debug", "report", "none"], ["report", "--debug", "none"],
                 ["report", "none", "--debug"]):  # fmt: skip
        with pytest.raises(UserError, match="none"):
            leanlift.cli.main(argv)
    assert "--debug" in complaint(capsys, "--debug=1", "report", "none")
    assert take_switch(["a", "--debug", "-x", "--y=1", "b"], "--debug") == (
        True, ["a", "-x", "--y=1", "b"])  # fmt: skip


def test_help_is_asked_for_among_other_options() -> None:
    assert asks_for_help(["--seed", "3", "-h"]) == (True, False)
    assert asks_for_help(["--help_all", "--nonsense"]) == (True, True)
    assert asks_for_help(["--output_dir=--help"]) == (False, False)


def test_the_command_that_goes_on_has_the_key_once() -> None:
    for given in (["--resume_from_checkpoint", "x y"], ["--resume-from-checkpoint=x"], []):
        said = resuming(["--config", "run.yaml", *given, "--seed", "3"])
        assert said.split("leanlift train ")[1] == (
            "--config run.yaml --seed 3 --resume_from_checkpoint true"
        )


def test_a_plan_takes_its_own_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "base")
    argv = ["plan", "--model_name_or_path=base", "--json", "--approx_rank", "4"]
    argv += ["--max_length", "64"]
    assert leanlift.cli.main([*argv, "--cpu", "--save=run.yaml"]) == 0
    assert json.loads(capsys.readouterr().out)["context"] == 0
    assert yaml.safe_load(Path("run.yaml").read_text())["max_length"] == 64
    for use_cpu in ("true", "false"):
        assert leanlift.cli.main([*argv, "--use_cpu", use_cpu]) == 0
        on_a_card = json.loads(capsys.readouterr().out)["context"] > 0
        assert on_a_card == (use_cpu == "false")


def test_no_argument_is_looked_for_by_hand() -> None:
    """What compares a text with a flag, outside of argparse, knows neither values nor spellings."""
    for file in Path(leanlift.cli.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                texts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                flags = [text for text in texts if str(text).startswith("--") and len(text) > 2]
                assert not flags, f"{file.name}:{node.lineno}"


def test_the_numbers_of_the_loop_say_no_percent() -> None:
    assert all("%" not in kind.what for kind in NUMBERS.values())


def test_without_a_table_the_classes_say_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As with another version of TRL, whose sources are not as they are known."""
    monkeypatch.setattr("leanlift.cli.help.options", lambda method: None)
    monkeypatch.setattr("leanlift.cli.early.options", lambda method: None)
    with pytest.raises(SystemExit) as stop:
        leanlift.cli.main(["train", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name} " in text for name in (*SETTINGS, "learning_rate", "fit"))
    for argv, message in (
        (["--learning_rat", "1"], "did you mean --learning_rate?"),
        (["--max_steps", "ten"], "cannot be 'ten': expected a whole number"),
        (["--learning_rate", "-1"], "expected learning_rate as a number, 0 or more"),
        (["--lr_scheduler_type", "cosinee"], "expected lr_scheduler_type as one of linear"),
    ):
        assert message in complaint(capsys, "train", *BASIC, *argv)
    assert "needs rows" in complaint(capsys, "train", *BASIC[:2])


def test_the_package_is_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import runpy

    monkeypatch.setattr("sys.argv", ["leanlift", "--version"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("leanlift", run_name="__main__")
    assert capsys.readouterr().out.startswith("leanlift ")


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("nothing", ["none", "None", "null", ""])
def test_nothing_is_an_empty_list(name: str, nothing: str, tmp_path: Path) -> None:
    for argv in ([f"--{name}", nothing], in_file(tmp_path, **{name: nothing})):
        assert getattr(parse_train([*BASIC, *argv])[0].lift_config(), name) == ()
    argv = [f"--{name}", str(LISTS[name])]
    assert getattr(parse_train([*BASIC, *argv])[0].lift_config(), name) == (LISTS[name],)
    assert run_options()[name].default == "none"


@pytest.mark.parametrize("given", ["4,7", "5 6"])
def test_ids_in_one_text_say_how_they_are_written(given: str, tmp_path: Path) -> None:
    name = "trainable_token_indices"
    for argv in ([f"--{name}", given], in_file(tmp_path, **{name: given})):
        with pytest.raises(UserError, match=r"with spaces between them \(4 7\) or as a list"):
            parse_train([*BASIC, *argv])


@pytest.mark.parametrize("name", [*LISTS, "target_modules"])
def test_a_name_has_letters(name: str) -> None:
    with pytest.raises(UserError, match=f"expected {name} as "):
        LiftConfig(**{name: ""})
