"""Whatever a kill can leave on the disk, the run goes on from it and ends with the same adapter.

A kill between two operations on files leaves the tree as it is between them. So one short run is
made whose output directory is recorded before every such operation, and each tree that differs is
resumed from. Cutting a process off inside an operation is left to `test_kill`, which sends SIGKILL.
"""

from __future__ import annotations

import builtins
import io
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept

from leanlift import UserError
from leanlift.training import LiftSFTConfig, RunArguments, last_whole_checkpoint, run
from leanlift.training.inputs import checkpoint_of_run

WEIGHTS = "adapter_model.safetensors"
STEPS = 3
Tree = dict[str, bytes]


class Recorder:
    """The distinct trees of a directory before each operation that changes files."""

    OPERATIONS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "fsync")

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trees: list[Tree] = []
        self._seen: set[int] = set()

    def look(self) -> None:
        tree = read_tree(self.directory)
        key = hash(frozenset(tree.items()))
        if key not in self._seen:
            self._seen.add(key)
            self.trees.append(tree)

    @contextmanager
    def recording(self, patch: pytest.MonkeyPatch) -> Iterator[None]:
        def looking(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.look()
                return function(*args, **kwargs)

            return call

        opened = open

        def opening(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if any(letter in mode for letter in "wax+"):
                self.look()
            return opened(file, mode, *args, **kwargs)

        with patch.context() as inside:
            for name in self.OPERATIONS:
                inside.setattr(os, name, looking(getattr(os, name)))
            inside.setattr(builtins, "open", opening)
            inside.setattr(io, "open", opening)
            yield
        self.look()


def read_tree(directory: Path) -> Tree:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def write_tree(directory: Path, tree: Tree) -> None:
    for name, data in tree.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(data)


def visible(tree: Tree) -> frozenset[str]:
    """What a reader of the directory takes for real: files, and what is in them."""
    shown = {name: data for name, data in tree.items() if not name.startswith(".")}
    return frozenset(f"{name} {hash(data)}" for name, data in shown.items())


def arguments(base: Path, output: Path, **changes: Any) -> tuple[RunArguments, LiftSFTConfig]:
    rows = base.parent / "rows.jsonl"
    row = {"prompt": "1 plus 1 is ", "completion": "2"}
    rows.write_text("".join(json.dumps({**row, "prompt": f"{i} is "}) + "\n" for i in range(10)))
    args = RunArguments(
        model_name_or_path=str(base), dataset_name=str(rows), approx_rank=4, refresh_interval=2
    )
    loop = LiftSFTConfig(
        **{
            "output_dir": str(output),
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "max_steps": STEPS,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "optim": "sparse_adamw",
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "save_total_limit": 1,
            "report_to": "none",
            "disable_tqdm": True,
            "max_length": 64,
            **changes,
        }
    )
    return args, loop


def recorded(
    base: Path, output: Path, schedule: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Tree], bytes]:
    """The states of the disk in a run, no two of them alike to a reader, and its adapter."""
    monkeypatch.setattr("leanlift.measure.report.find_spec", lambda name: None)  # no picture
    recorder = Recorder(output)
    with recorder.recording(monkeypatch):
        run(*arguments(base, output, lr_scheduler_type=schedule))
    assert not [path.name for path in output.iterdir() if path.name.startswith(".")]
    by_content: dict[frozenset[str], Tree] = {}
    for tree in recorder.trees:  # of what looks alike, the one with the most left behind
        other = by_content.get(visible(tree), {})
        by_content[visible(tree)] = tree if len(tree) >= len(other) else other
    assert len(by_content) >= 12
    return list(by_content.values()), (output / WEIGHTS).read_bytes()


def resumed_from(base: Path, place: Path, tree: Tree, schedule: str, wanted: bytes) -> str | None:
    """The checkpoint that a run goes on from where the disk is `tree`, to the adapter `wanted`."""
    write_tree(place, tree)
    place.mkdir(exist_ok=True)
    found = last_whole_checkpoint(place)
    args, loop = arguments(base, place, lr_scheduler_type=schedule, resume_from_checkpoint="true")
    if found is None:  # killed before the first checkpoint: a new run may begin here
        loop.resume_from_checkpoint = None
        assert checkpoint_of_run(loop, place) is None
        return None
    run(args, loop)
    assert (place / WEIGHTS).read_bytes() == wanted, (place, found)
    left = {path.name for path in place.iterdir() if path.is_dir() or path.name[0] == "."}
    # a run that had ended takes no step, so it rotates nothing
    assert left <= {f"checkpoint-{STEPS}", f"checkpoint-{STEPS - 1}"}, left
    assert last_whole_checkpoint(place) == str(place / f"checkpoint-{STEPS}")
    return Path(found).name


EVERY_CHECKPOINT = {f"checkpoint-{step}" for step in range(1, STEPS + 1)}


@pytest.mark.thorough
@pytest.mark.parametrize("schedule", ["constant", "linear"])
def test_every_state_of_the_disk_leads_to_the_same_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, schedule: str
) -> None:
    trees, wanted = recorded(base, tmp_path / "run", schedule, monkeypatch)
    found = {
        resumed_from(base, tmp_path / f"{schedule}-{number}", tree, schedule, wanted)
        for number, tree in enumerate(trees)
    }
    assert found - {None} == EVERY_CHECKPOINT


@pytest.mark.thorough
def test_a_state_after_each_checkpoint_leads_to_the_same_adapter(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each checkpoint, the state with the most left behind of those that go on from it."""
    trees, wanted = recorded(base, tmp_path / "run", "linear", monkeypatch)
    fullest: dict[str, Tree] = {}
    for number, tree in enumerate(trees):
        write_tree(tmp_path / f"looked-at-{number}", tree)
        found = last_whole_checkpoint(tmp_path / f"looked-at-{number}")
        if found is not None:
            name = Path(found).name
            fullest[name] = max(tree, fullest.get(name, {}), key=len)
    assert set(fullest) == EVERY_CHECKPOINT
    for name, tree in fullest.items():
        assert resumed_from(base, tmp_path / name, tree, "linear", wanted) == name


class FullDisk:
    """From operation number `number` on, nothing can be written."""

    def __init__(self, number: int) -> None:
        self.left = number

    def fail(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(28, "No space left on device")


@pytest.mark.parametrize("number", swept([0, 3, 8, 20, 30], 3, 20))
def test_a_full_disk_is_one_sentence_and_keeps_what_was_good(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("leanlift.measure.report.find_spec", lambda name: None)
    output = tmp_path / "run"
    args, loop = arguments(base, output)
    disk, real = FullDisk(number), os.fsync

    def fsync(handle: int) -> None:
        disk.fail()
        real(handle)

    with monkeypatch.context() as inside:
        inside.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match=r"could not be written \(.*No space left on device\)"):
            run(args, loop)
    shown = {path.name for path in output.iterdir()} if output.exists() else set()
    assert all(name.startswith("checkpoint-") for name in shown), shown
    found = last_whole_checkpoint(output)
    if found is not None:
        loop = arguments(base, output, resume_from_checkpoint="true")[1]
        run(args, loop)
        assert (output / WEIGHTS).exists()


def test_running_out_of_memory_in_a_save_keeps_what_was_good(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanlift.errors import OutOfMemoryError
    from leanlift.training.checkpointing import parts

    calls = []
    real = parts.write_tensors

    def write(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2 GiB")
        real(*args)

    monkeypatch.setattr(parts, "write_tensors", write)
    args, loop = arguments(base, tmp_path / "run")
    with pytest.raises(OutOfMemoryError, match=r"the checkpoint of step 2 .*is .*checkpoint-1"):
        run(args, loop)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["checkpoint-1"]
