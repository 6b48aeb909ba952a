"""Files that are links, pipes, bombs or without end, and reports that lie."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file
from victim import NAME, WEIGHTS, Victim, edit_json, set_at

from leanlift import (
    UserError,
    merge_adapter,
)
from leanlift.adapters import open_adapter
from leanlift.io.measured import load_report
from leanlift.measure import LiveBytes, format_report


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def test_a_pickle_is_never_opened(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    (adapter / WEIGHTS).write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    victim.refuses(adapter, "not a whole safetensors file")
    torch.save(Bomb(tmp_path / "executed"), adapter / WEIGHTS)
    victim.refuses(adapter, "not a whole safetensors file")
    (adapter / WEIGHTS).rename(adapter / "adapter_model.bin")
    victim.refuses(adapter, "does not exist")


def test_links_to_devices_are_not_read(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    for name, match in (
        (WEIGHTS, "does not exist"),
        ("adapter_config.json", "no leanlift adapter"),
    ):
        (adapter / name).unlink()
        (adapter / name).symlink_to("/dev/zero")
        victim.refuses(adapter, match)
        (adapter / name).unlink()
        (adapter / name).write_bytes(victim.files["own"][name])


STRANGE_FILES = ("adapter_config.json", "run.json", "memory.json", "tokenizer_config.json")


@pytest.mark.parametrize("name", STRANGE_FILES)
def test_pipes_and_files_without_end_stop_nobody(victim: Victim, tmp_path: Path, name: str) -> None:
    """A pipe would be waited for, a device read for ever, a sparse file read whole."""

    def pipe(path: Path) -> None:
        os.mkfifo(path)

    def device(path: Path) -> None:
        path.symlink_to("/dev/zero")

    def endless(path: Path) -> None:
        with path.open("wb") as file:
            file.truncate(2**33)

    for make in (pipe, device, endless):
        adapter = victim.put("own", tmp_path / "adapter")
        (adapter / name).unlink(missing_ok=True)
        make(adapter / name)
        (adapter / "tokenizer.json").write_text("{}")
        tracemalloc.start()
        try:
            merge_adapter(adapter, tmp_path / "merged", base=victim.base, progress=False)
        except UserError as error:
            assert name in str(error)  # noqa: PT017 - it may also do without
        finally:
            assert tracemalloc.get_traced_memory()[1] < 2**25
            tracemalloc.stop()
        shutil.rmtree(tmp_path / "merged", ignore_errors=True)
        shutil.rmtree(adapter)


def test_an_index_of_nothing_is_not_unfolded(victim: Victim, tmp_path: Path) -> None:
    """Counts of a matrix of 2^28 rows, in a sparse file that costs nobody anything to make."""
    adapter = victim.put("own", tmp_path / "adapter")
    rows = 2**28
    edit_json(adapter / "adapter_config.json", set_at("base", "shapes", NAME, [rows, 64]))
    edit_json(adapter / "adapter_config.json", set_at("base", "samples", {}))
    tensors = load_file(adapter / WEIGHTS)
    names = [f"{NAME}.values", f"{NAME}.index.columns", f"{NAME}.index.counts"]
    header: dict[str, Any] = {}
    for name, size, dtype, shape in zip(
        names, (0, 0, rows), ("F32", "U8", "U8"), ([0], [0], [rows, 1]), strict=True
    ):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}
    assert names[0] in tensors
    text = json.dumps(header).encode()
    with (adapter / WEIGHTS).open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + rows)
    with (
        LiveBytes() as live,
        open_adapter(adapter) as opened,
        pytest.raises(UserError, match="too few for the 268435456x64 matrix"),
    ):
        opened.layer(NAME)
    assert live.peak <= 2 * rows


PATTERNS: dict[str, Any] = {
    "many": {f"layer{i}": 0.1 for i in range(65)},
    "long": {"a" * 257: 0.1},
    "very-long": {"|".join(f"x{i}" for i in range(20_000)): 0.1},
    "nested": {"(" * 40_000 + "a" + ")" * 40_000: 0.1},
}


@pytest.mark.parametrize("case", PATTERNS)
def test_patterns_that_cost_more_than_they_say(victim: Victim, tmp_path: Path, case: str) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    edit_json(adapter / "adapter_config.json", set_at("lift", "density_pattern", PATTERNS[case]))
    started = time.process_time()
    victim.refuses(adapter, "at most 64 patterns of at most 256 characters")
    assert time.process_time() - started < 1.0


def report_of(tmp_path: Path) -> Path:
    """A run's memory.json, with a plan, as leanlift writes it."""
    peak = {"seconds": 1.5, "tensors": 2**20, "reserved": 2**21, "resident": None}
    plan = {"categories": {"index": 3, "values": 4}, "phases": {"train": 2**20}}
    data = {
        "device": "cpu",
        "phases": {"load": peak, "train": {**peak, "resident": 7}, "export": peak},
        "categories": {"index": 3, "values": 4, "optimizer state": 8, "scratch": 0},
        "entries": 3,
        "notes": ["selection: 14 matrices"],
        "plan": plan,
    }
    (tmp_path / "memory.json").write_text(json.dumps(data))
    return tmp_path


VALUES: list[Any] = [
    None, True, -1, 0, 2.5, 10**30, 10**99, float("nan"), float("inf"), "", "text", "\x1b[2J",
    "a\nb", "x" * 10_000, [], [1], {}, {"a": 1}, {"seconds": 1}, [[[]]], {"\x1b": 1},
]  # fmt: skip


def paths(data: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in JSON data."""
    found = [before] if before else []
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            found += paths(value, (*before, key))
    return found


def test_reports_that_lie_end_in_a_sentence_or_in_plain_text(tmp_path: Path) -> None:
    """Every value replaced by every kind of value, every key taken away."""
    original = json.loads((report_of(tmp_path) / "memory.json").read_text())
    assert "train" in format_report(load_report(tmp_path))
    tried = 0
    for place in paths(original):
        for value in (*VALUES, KeyError):
            data = copy.deepcopy(original)
            holder = data
            for key in place[:-1]:
                holder = holder[key]
            if value is KeyError:
                del holder[place[-1]]
            else:
                holder[place[-1]] = value
            (tmp_path / "memory.json").write_text(json.dumps(data))
            tried += 1
            try:
                text = format_report(load_report(tmp_path))
            except UserError as error:
                text = str(error)  # what came is never repeated
            assert "\x1b" not in text, (place, value)
            assert len(text) < 10_000, (place, value)
    assert tried > 500


@pytest.mark.thorough
def test_a_few_hundred_random_mutations() -> None:
    result = run_python("-m", "benchmarks.fuzz_adapter", "--count", "300", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr
    loaded, refused, failed = map(int, result.stdout.split("\nall")[1].split()[:3])
    assert (loaded > 20, refused > 200, failed) == (True, True, 0)
