"""What people type by mistake: one sentence, exit code 2, at once.

In a process apart from the tests', which have imported everything: what is measured is the CPU time
up to the sentence, imports included. One process for all in `make test`, where what an earlier
mistake has imported is there for a later one; each in one of its own, as a shell has it, otherwise.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_python
from snapshots import assert_screen
from tiny import make_checkpoint

from leanlift.cli import main
from leanlift.cli.help import GROUPS, train_help
from leanlift.cli.options import MANY, options
from leanlift.methods import METHODS
from leanlift.settings import ANYTHING, TEXT, WORD

SECONDS = 2.0
CODE = """
import contextlib, io, json, sys, time
from leanlift.cli import main
before = 0.0
for command in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(command)
    except SystemExit as error:
        code = error.code
    heavy = [name for name in ("torch", "transformers", "trl", "datasets") if name in sys.modules]
    found = {"code": code, "cpu": time.process_time() - before, "heavy": heavy}
    before = time.process_time()
    print(json.dumps({**found, "out": out.getvalue(), "err": err.getvalue()}))
"""


def typed(cwd: Path, *commands: list[str]) -> list[dict[str, Any]]:
    """What commands of one process come to: code, CPU seconds, heavy imports, out and err."""
    done = run_python("-c", CODE, json.dumps(commands), cwd=cwd)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(commands), done.stderr[-2000:]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as a user may have it."""
    root = tmp_path_factory.mktemp("wrong")
    make_checkpoint(root / "base")
    rows = [{"instruction": "a", "output": "b"}] * 4
    (root / "rows.json").write_text(json.dumps(rows))
    (root / "columns.json").write_text(json.dumps([{"question": "a", "reply": "b"}]))
    (root / "typed.jsonl").write_text('{"prompt": "a", "completion": 7}\n')
    (root / "half.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')
    (root / "empty.json").write_text("[]")
    (root / "rows.xml").write_text("a,b\n")
    (root / "run.yaml").write_text("learning_rat: 1\n")
    (root / "kind.yaml").write_text("max_steps: many\n")
    (root / "twice.yaml").write_text("seed: 1\nseed: 2\n")
    (root / "list.yaml").write_text("- seed\n")
    (root / "done" / "checkpoint-4").mkdir(parents=True)
    (root / "lora").mkdir()
    (root / "lora" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (root / "t5").mkdir()
    (root / "t5" / "config.json").write_text('{"model_type": "t5"}')
    (root / "model.gguf").write_bytes(b"GGUF")
    (root / "words.yaml").write_text(
        'eval_strategy: no\nsave_strategy: no\nbf16: "false"\npad_to_multiple_of: 8\n'
        "target_modules: [q_proj, v_proj]\nmax_length: null\ndensity_pattern: {down_proj: 0.1}\n"
    )
    (root / "head.jsonl").write_text('{"prompt": null}\n{"prompt": "a", "completion": "b"}\n')
    (root / "ROWS.NDJSON").write_text('{"prompt": "a", "completion": "b"}\n')
    return root


TRAIN = ["train", "--model_name_or_path", "base", "--dataset_name", "rows.json"]
EVAL = ["eval", "--model_name_or_path", "base"]
WRONG: dict[str, tuple[list[str], str]] = {
    "no command": (["trian"], "invalid choice: 'trian'"),
    "nothing to train": (["train", "--seed", "1"], "needs a base: give --model_name_or_path"),
    "no rows": (["train", "--model_name_or_path", "base"], "needs rows: give --dataset_name"),
    "a file without --config": (["train", "run.yaml"], "with --config: leanlift train --config"),
    "a key that is no key": (["train", "--config", "run.yaml"], "did you mean learning_rate?"),
    "a file that is not there": (["train", "--config", "nope.yaml"], "nope.yaml does not exist"),
    "a value of the wrong kind": (["train", "--config", "kind.yaml"], "max_steps cannot be"),
    "a key that stands twice": (["train", "--config", "twice.yaml"], "stands on lines 1 and 2"),
    "no mapping": (["train", "--config", "list.yaml"], "holds no mapping"),
    "a flag that is no flag": ([*TRAIN, "--learning_rat", "1"], "did you mean --learning_rate?"),
    "a flag without a value": ([*TRAIN, "--learning_rate"], "--learning_rate needs a value"),
    "no number": ([*TRAIN, "--max_steps", "ten"], "cannot be 'ten': expected a whole number"),
    "out of range": ([*TRAIN, "--learning_rate", "-1"], "learning_rate as a number, 0 or more"),
    "a batch of none": ([*TRAIN, "--per_device_train_batch_size", "0"], "at least 1; got 0"),
    "no share": ([*TRAIN, "--density", "5"], "density"),
    "no selector": ([*TRAIN, "--selector", "best"], "selector"),
    "no format": ([*TRAIN, "--log_format", "xml"], "log_format as one of auto, rich, plain, json"),
    "evaluation of nothing": ([*TRAIN, "--eval_strategy", "steps"], "name rows with eval_dataset"),
    "no schedule": ([*TRAIN, "--lr_scheduler_type", "cosinee"], "did you mean cosine?"),
    "no optimizer": ([*TRAIN, "--optim", "adam"], "optim cannot be 'adam'"),
    "never": ([*TRAIN, "--save_strategy", "never"], "expected one of"),
    "no file to save": (["plan", "--model_name_or_path", "base", "--save"], "--save needs a value"),
    "a name of other tools": ([*TRAIN, "--lora_r", "16"], "did you mean --rank_budget?"),
    "two budgets": ([*TRAIN, "--density", "0.1", "--rank_budget", "8"], "give one of them"),
    "a template that is not there": ([*TRAIN, "--chat_template_path", "nope"], "nope does not"),
    "a base alone": (["plan", "base"], "takes a base as --model_name_or_path"),
    "no rows to evaluate": ([*EVAL, "--data", "empty.json"], "holds no rows"),
    "no judge": ([*EVAL, "--data", "rows.json", "--judge", "x"], "expected a judge among"),
    "a limit of none": ([*EVAL, "--data", "rows.json", "--limit", "0"], "limit of at least 1"),
    "both widths": ([*TRAIN, "--load_in_8bit", "true", "--load_in_4bit", "true"], "exclude each"),
    "no base": (["plan", "--model_name_or_path", "./bse"], "base ./bse does not exist"),
    "an adapter for a base": (["plan", "--model_name_or_path", "lora"], "name the base that it"),
    "a GGUF file": (["plan", "--model_name_or_path", "model.gguf"], "a GGUF file"),
    "another kind of model": (["plan", "--model_name_or_path", "t5"], "no causal language"),
    "rows that are not there": ([*TRAIN[:3], "--dataset_name", "row.json"], "row.json does not"),
    "rows of another kind": ([*TRAIN[:3], "--dataset_name", "rows.xml"], "expected .json, .jsonl"),
    "other columns": ([*TRAIN[:3], "--dataset_name", "columns.json"], "'question', 'reply'"),
    "no text": ([*TRAIN[:3], "--dataset_name", "typed.jsonl"], "row 0"),
    "half a file": ([*TRAIN[:3], "--dataset_name", "half.jsonl"], "line 2 is no JSON"),
    "no rows at all": ([*TRAIN[:3], "--dataset_name", "empty.json"], "holds no rows"),
    "a directory that is taken": ([*TRAIN, "--output_dir", "done"], "resume_from_checkpoint true"),
    "a merge that is taken": ([*TRAIN, "--merged_dir", "base"], "base already exists"),
    "no checkpoint": ([*TRAIN, "--resume_from_checkpoint", "ckpt"], "ckpt is no checkpoint"),
    "eval of nothing": (["eval", "--data", "rows.json"], "give --model_name_or_path, --adapter"),
    "eval without rows": (["eval", "--adapter", "x", "--data", "y.json"], "adapter x does not"),
    "info of a LoRA": (["info", "lora"], "an adapter of PEFT's of type LORA"),
    "info of a base": (["info", "base"], "a model's checkpoint directory"),
    "report of nothing": (["report", "nowhere"], "nowhere"),
    "export of nothing": (["export", "./gone", "merged"], "./gone does not exist"),
    "export onto something": (["export", "a/b", "base"], "already exists and is not empty"),
    "no card": (["plan", "--model_name_or_path", "base", "--fit", "big"], "big"),
}  # fmt: skip


@pytest.fixture(scope="module")
def told(place: Path) -> dict[str, dict[str, Any]]:
    """What all mistakes come to that import nothing heavy, one after the other."""
    return dict(zip(WRONG, typed(place, *(WRONG[name][0] for name in WRONG)), strict=True))


def check(case: str, found: dict[str, Any]) -> None:
    said = found["err"]
    assert found["code"] == 2, said
    assert WRONG[case][1] in said
    assert len(said.strip().splitlines()) == 1, said
    assert found["cpu"] < SECONDS, found
    assert found["heavy"] == [], found


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_at_once(case: str, told: dict[str, dict[str, Any]]) -> None:
    check(case, told[case])


@pytest.mark.thorough
@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_is_told_at_once_by_a_process_of_its_own(case: str, place: Path) -> None:
    check(case, typed(place, WRONG[case][0])[0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("wrong-key", ["train", "--config", "run.yaml"]),
        ("wrong-column", [*TRAIN[:3], "--dataset_name", "columns.json"]),
        ("help", ["train", "--help"]),
    ],
)
def test_what_a_terminal_shows_of_it(
    name: str,
    arguments: list[str],
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with contextlib.suppress(SystemExit):
        main(arguments)
    said = capsys.readouterr()
    command = f"$ leanlift {' '.join(arguments)}\n"
    assert_screen(command + said.out + said.err, name)


@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["train", "--help_all"], ["plan", "-h"]]
)
def test_help_is_there_at_once(arguments: list[str], tmp_path: Path) -> None:
    (found,) = typed(tmp_path, arguments)
    assert found["code"] == 0
    assert found["heavy"] == []
    assert found["cpu"] < 0.3 * SECONDS  # 0.1 s here; a loaded machine takes longer to do the same
    assert max(map(len, found["out"].splitlines())) <= 80


def test_help_has_what_a_run_takes_and_says_what_it_takes_by_itself() -> None:
    table, text = options(), train_help(False)
    assert table is not None
    assert text is not None
    named = {name for names in GROUPS.values() for name in names}
    assert named <= {name for method in METHODS for name in options(method) or ()}
    for name, default in {"density": "(0.05)", "optim": "(sparse_adamw_8bit)"}.items():
        assert default in " ".join(text.partition(f"--{name} ")[2].partition("\n  --")[0].split())
    every = train_help(True)
    assert every is not None
    assert all(f"--{name}" in every for name in table)


def test_options_read_from_sources_are_those_of_the_classes() -> None:
    """Names, kinds of values and what is required: what is refused early would be refused late."""
    import dataclasses

    from leanlift.cli.settings import table_of_classes
    from leanlift.training import LiftSFTConfig, RunArguments

    early, late = options(), table_of_classes()
    assert early is not None
    fields = {
        field.name
        for kind in (LiftSFTConfig, RunArguments)
        for field in dataclasses.fields(kind)
        if field.init
    }
    assert set(early) == set(late) == fields
    for name, option in early.items():
        other = late[name]
        assert option.required == other.required, name
        assert option.kind.switch == other.kind.switch, name
        assert not other.kind.many or option.kind.many or option.kind is ANYTHING, name
        known = option.kind not in (ANYTHING, TEXT, WORD, MANY)
        assert not known or option.kind.what == other.kind.what, name


Given = Callable[[], list[str]]


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--seed=3", "--no_load_in_4bit", "--packing"],
        ["--target_modules", "q_proj", "v_proj", "--save_steps", "0.5"],
        ["--max_steps", "-1", "--use_cpu", "yes", "--retired-limit", "none"],
        ["--dataset_split", "train[:2]", "--report_to", "none", "--eval_dataset_name", "rows.json"],
        ["--lr_scheduler_kwargs", '{"a": 1}', "--density_pattern", '{"down_proj": 0.1}'],
        ["--warmup_steps", "1e-1", "--learning_rate", "2e-4", "--bf16", "false"],
        ["--dataset_name", "acme/rows"],
        ["--output_dir", "done", "--resume_from_checkpoint", "true"],
        ["--resume_from_checkpoint", "no"],
        ["--bf16", "--packing"],
        ["--pad_to_multiple_of", "8"],
        ["--debug", "underflow_overflow"],
        ["--dataset_name", "head.jsonl", "--dataset_split", "train[1:]"],
        ["--dataset_name", "ROWS.NDJSON"],
        ["--config", "words.yaml"],
    ],
    ids=lambda more: " ".join(more)[:30] or "plain",
)
def test_nothing_that_a_run_takes_is_refused_early(
    more: list[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanlift.cli.early import check_early
    from leanlift.cli.settings import parse_train

    monkeypatch.chdir(place)
    check_early("train", [*TRAIN[1:], *more])
    parse_train([*TRAIN[1:], *more])
