"""An adapter is a file from the internet: each way in which one can lie has its sentence."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_python
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint

from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    refresh_mask,
    save_adapter,
)
from leanlift.adapter import open_adapter, plan_shira, write_shira
from leanlift.memory import LiveBytes, format_report, load_report
from leanlift.model import lift_layers

NAME = "model.layers.0.self_attn.q_proj"
INDICES, WEIGHT = f"base_model.model.{NAME}.shira_indices", f"base_model.model.{NAME}.shira_weight"
WEIGHTS = "adapter_model.safetensors"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(3, 43).reshape(2, 20)).logits


class Victim:
    """A base, live models over it, and an adapter in the form "own", "peft" or "bare"."""

    def __init__(self, work: Path) -> None:
        self.base = make_checkpoint(work / "base")
        self.stock = load(self.base, "dense").eval()
        self.attached = get_lift_model(
            copy.deepcopy(self.stock), LiftConfig(approx_rank=8), progress=False
        )
        for layer in lift_layers(self.attached).values():
            layer.values.data.normal_(std=0.05)
        refresh_mask(self.attached)
        save_adapter(self.attached, work / "own")
        (work / "peft").mkdir()
        with open_adapter(work / "own") as adapter:
            write_shira(work / "peft", adapter, plan_shira(adapter), lambda modules: modules)
        self.files = {
            form: {file.name: file.read_bytes() for file in (work / form).iterdir()}
            for form in ("own", "peft")
        }
        bare = {k: v for k, v in self.files["peft"].items() if k != "leanlift.json"}
        self.files["bare"] = bare
        self.before = logits(self.stock), logits(self.attached)

    def put(self, form: str, directory: Path) -> Path:
        directory.mkdir()
        for name, data in self.files[form].items():
            (directory / name).write_bytes(data)
        return directory

    def refuses(self, adapter: Path, match: str) -> None:
        """On a stock model, on an attached one, which stay as they are, and in a merge."""
        for model, before in zip((self.stock, self.attached), self.before, strict=True):
            with pytest.raises(UserError, match=match):
                load_adapter(model, adapter)
            assert torch.equal(logits(model), before)
        assert not lift_layers(self.stock)
        merged = adapter.parent / "merged"
        with pytest.raises(UserError):
            merge_adapter(adapter, merged, base=self.base, progress=False)
        assert sorted(path.name for path in adapter.parent.iterdir()) == [adapter.name]


@pytest.fixture(scope="module")
def victim(tmp_path_factory: pytest.TempPathFactory) -> Victim:
    torch.manual_seed(0)
    return Victim(tmp_path_factory.mktemp("victim"))


def edit_tensors(adapter: Path, **changes: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace tensors, given by the end of their names with `__` for a dot, by functions of
    them; None takes a tensor out."""
    tensors = load_file(adapter / WEIGHTS)
    for end, change in changes.items():
        key = next(k for k in tensors if NAME in k and k.endswith(end.replace("__", ".")))
        new = change(tensors.pop(key).clone())
        if new is not None:
            tensors[key] = new.contiguous()
    save_file(tensors, adapter / WEIGHTS)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def at(index: Any, value: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


TENSOR_CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "column-outside": ("own", {f"{NAME}__index__columns": at(0, 200)}, "outside its segment"),
    "unsorted": ("own", {f"{NAME}__index__columns": lambda t: t.flip(0)}, "index of .* is broken"),
    "duplicated": ("own", {f"{NAME}__index__columns": lambda t: t * 0}, "not distinct"),
    "counts-disagree": ("own", {f"{NAME}__index__counts": at((0, 0), 60)}, "counts say"),
    "counts-missing": ("own", {f"{NAME}__index__counts": lambda t: None}, "lacks .*counts"),
    "too-few-values": ("own", {f"{NAME}__values": lambda t: t[1:]}, "values for .* positions"),
    "integer-values": ("own", {f"{NAME}__values": lambda t: t.int()}, "1-D floating tensor"),
    "double-values": ("own", {f"{NAME}__values": lambda t: t.double()}, "1-D floating tensor"),
    "signed-columns": ("own", {f"{NAME}__index__columns": lambda t: t.char()}, "1-D uint8"),
    "nan": ("own", {f"{NAME}__values": at(3, float("nan"))}, "NaN or infinite"),
    "infinite": ("own", {f"{NAME}__values": at(3, float("-inf"))}, "NaN or infinite"),
    "nan-retired": ("own", {"settled__values": at(0, float("nan"))}, "NaN or infinite"),
    "row-outside": ("peft", {"shira_indices": at((0, 0), 64)}, "positions outside its 64x64"),
    "row-negative": ("peft", {"shira_indices": at((0, 0), -1)}, "positions outside its 64x64"),
    "column-far-outside": ("bare", {"shira_indices": at((1, 0), 2**31 - 1)}, "positions outside"),
    "peft-unsorted": ("peft", {"shira_indices": lambda t: t.flip(1)}, "other entries than"),
    "peft-duplicated": ("peft", {"shira_indices": at((slice(None), 1), 0)}, "positions of .* are"),
    "peft-float-indices": ("peft", {"shira_indices": lambda t: t.float()}, "expected int32"),
    "peft-too-few": ("bare", {"shira_weight": lambda t: t[1:]}, "expected int32 \\(2"),
    "peft-nan": ("bare", {"shira_weight": at(0, float("nan"))}, "NaN or infinite"),
}


@pytest.mark.parametrize("case", TENSOR_CASES)
def test_tensors_that_lie_are_refused(victim: Victim, tmp_path: Path, case: str) -> None:
    form, changes, match = TENSOR_CASES[case]
    adapter = victim.put(form, tmp_path / "adapter")
    edit_tensors(adapter, **changes)
    victim.refuses(adapter, match)


def test_entries_both_active_and_retired_are_refused(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    tensors = load_file(adapter / WEIGHTS)
    for part in ("values", "index.columns", "index.counts"):
        tensors[f"{NAME}.settled.{part}"] = tensors[f"{NAME}.{part}"].clone()
    save_file(tensors, adapter / WEIGHTS)
    victim.refuses(adapter, "both active and retired")


def test_sums_that_overflow_are_refused(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("bare", tmp_path / "adapter")
    edit_tensors(adapter, shira_weight=at([0, 1], 3e38), shira_indices=at((slice(None), [0, 1]), 1))
    victim.refuses(adapter, "NaN or infinite")


def test_offsets_too_large_for_their_dtype_are_refused(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    edit_tensors(adapter, **{f"{NAME}__values": at(0, 3.4e38)})
    edit_json(adapter / "adapter_config.json", lambda d: d["lift"].update(values_dtype="bfloat16"))
    victim.refuses(adapter, "NaN or infinite")


BAD_NAMES = ["../x", "a/../../b", "/etc/passwd", "", "model..norm", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_climb_are_refused(victim: Victim, tmp_path: Path, name: str) -> None:
    adapter = victim.put("own", tmp_path / "adapter")

    def rename(data: Any) -> None:
        data["base"]["shapes"][name] = data["base"]["shapes"].pop(NAME)

    edit_json(adapter / "adapter_config.json", rename)
    victim.refuses(adapter, "expected the name of a module")


@pytest.mark.parametrize("name", ["__class__", "model.norm", "model", "lm_head", f"{NAME}.base"])
@pytest.mark.parametrize("form", ["own", "peft", "bare"])
def test_modules_that_cannot_be_trained_are_refused(
    victim: Victim, tmp_path: Path, name: str, form: str
) -> None:
    adapter = victim.put(form, tmp_path / "adapter")
    tensors = {
        k.replace(f"{NAME}.", f"{name}."): v for k, v in load_file(adapter / WEIGHTS).items()
    }
    save_file(tensors, adapter / WEIGHTS)

    def rename(data: Any) -> None:
        for part in ("shapes", "formats", "samples"):
            data["base"][part][name] = data["base"][part].pop(NAME)
        if "entries" in data:
            data["entries"][name] = data["entries"].pop(NAME)

    if form != "bare":
        edit_json(adapter / {"own": "adapter_config.json", "peft": "leanlift.json"}[form], rename)
    victim.refuses(adapter, "no such Linear|leanlift trains|has no such|lacks")


@pytest.mark.parametrize(
    "length", [0, 7, 10**6, 2**32, 2**63, 2**64 - 1], ids=["0", "7", "10^6", "2^32", "2^63", "2^64"]
)
@pytest.mark.parametrize("form", ["own", "peft"])
def test_header_lengths_that_lie(victim: Victim, tmp_path: Path, form: str, length: int) -> None:
    adapter = victim.put(form, tmp_path / "adapter")
    data = victim.files[form][WEIGHTS]
    (adapter / WEIGHTS).write_bytes(length.to_bytes(8, "little") + data[8:])
    victim.refuses(adapter, "not a whole safetensors file")


@pytest.mark.parametrize("share", [0, 0.001, 0.1, 0.5, 0.999])
def test_files_that_are_cut_off(victim: Victim, tmp_path: Path, share: float) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    for name, match in (
        (WEIGHTS, "not a whole safetensors"),
        ("adapter_config.json", "valid JSON"),
    ):
        data = victim.files["own"][name]
        (adapter / name).write_bytes(data[: int(share * len(data))])
        victim.refuses(adapter, match)
        (adapter / name).write_bytes(data)


def set_at(*path: Any) -> Callable[[Any], None]:
    """Set the value at the end of a path of keys."""

    def change(data: Any) -> None:
        for key in path[:-2]:
            data = data[key]
        data[path[-2]] = path[-1]

    return change


CONFIG_CASES: dict[str, tuple[Callable[[Any], None], str]] = {
    "digest": (lambda d: d["base"].update(digest="0" * 64, samples={}), "other weights"),
    "samples-a-list": (set_at("base", "samples", []), "samples of tensors"),
    "samples-of-others": (set_at("base", "samples", {"model": "AAAA"}), "samples of the tensors"),
    "samples-no-text": (set_at("base", "samples", {NAME: 3}), "samples of the tensors it names"),
    **{
        f"samples-{what}": (set_at("base", "samples", NAME, text), match)
        for what, text, match in (
            ("no-kind", "AAAA", "expected one of nf4"),
            ("no-base64", "nf4:" + "*" * 16, "expected base64"),
            ("cut", "nf4:AAAA", "16 bytes a position"),
            ("empty", "nf4:", "16 bytes a position"),
            ("many", "nf4:" + "A" * 10**6, "at most 1024 positions"),
            ("unsorted", "nf4:" + "A" * 128, "sorted positions inside"),
            ("outside", "nf4:" + "/" * 64, "sorted positions inside"),
            ("nan", "nf4:AAAAAAAAAAAAAMB/AADAfw==", "finite bounds in order"),
            ("lie", "nf4:AAAAAAAAAAAAAIA/AACAPw==", "other weights"),
        )
    },
    "revision": (set_at("base", "revision", "main"), "a commit or null"),
    "format": (set_at("base", "formats", NAME, "kind", "nf5"), "a format of weights"),
    "shape": (set_at("base", "shapes", NAME, [64, 65]), "is 64x65; the loaded model"),
    "shape-huge": (set_at("base", "shapes", NAME, [2**31 - 1] * 2), "2147483647x2147483647"),
    "shape-too-huge": (set_at("base", "shapes", NAME, [2**63, 1]), "expected two sizes"),
    "shape-boolean": (set_at("base", "shapes", NAME, [True, 64]), "expected two sizes"),
    "shapes-a-list": (set_at("base", "shapes", []), "shapes of trained matrices"),
    "name-control": (set_at("base", "name", "\x1b[2J"), "the name of the base"),
    "name-surrogate": (set_at("base", "name", "\ud800"), "the name of the base"),
    "name-a-number": (set_at("base", "name", 3), "the name of the base"),
    "sampled-climbs": (set_at("base", "sampled", ["../x"]), "names of sampled tensors"),
    "base-a-list": (set_at("base", []), "expected the keys"),
    "lift-a-string": (set_at("lift", "all"), "expected the keys of a LiftConfig"),
    "density-text": (set_at("lift", "density", "0.05"), "density to be a number"),
    "density-nan": (set_at("lift", "density", float("nan")), r"density in \(0, 1\]"),
    "seed-huge": (set_at("lift", "selection_seed", 2**63), "selection_seed to be a whole number"),
    "limit-huge": (set_at("lift", "retired_limit", 1e308), "retired_limit of 0 or more"),
    "pattern-flags": (set_at("lift", "density_pattern", {"(?i)a": 0.1}), "no regular expression"),
    "refreshes": (set_at("refreshes", -1), "a count of refreshes"),
    "version": (set_at("format_version", [1]), "has adapter format"),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
@pytest.mark.parametrize("form", ["own", "peft"])
def test_configurations_that_lie(victim: Victim, tmp_path: Path, form: str, case: str) -> None:
    change, match = CONFIG_CASES[case]
    adapter = victim.put(form, tmp_path / "adapter")
    edit_json(adapter / {"own": "adapter_config.json", "peft": "leanlift.json"}[form], change)
    victim.refuses(adapter, match)


@pytest.mark.parametrize("form", ["own", "peft"])
def test_shapes_that_no_tensor_backs_are_not_allocated(
    victim: Victim, tmp_path: Path, form: str
) -> None:
    adapter = victim.put(form, tmp_path / "adapter")
    config = adapter / {"own": "adapter_config.json", "peft": "leanlift.json"}[form]
    edit_json(config, set_at("base", "shapes", NAME, [2**20, 2**12]))
    tracemalloc.start()
    with LiveBytes() as live, open_adapter(adapter) as opened, pytest.raises(UserError):
        opened.layer(NAME)
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert live.peak < 2**20
    assert python < 2**20


NO_JSON = [
    "[" * 990 + "]" * 990,
    '{"a":' * 65 + "{}" + "}" * 65,
    "[" * 100_000,
    '{"a":' * 100_000,
    "9" * 5000,
    "9" * 200,
    "",
    "\ufeff{}",
    "[]",
    "null",
    "{}",
]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: text[:6])
def test_json_that_is_none_or_of_another_kind(victim: Victim, tmp_path: Path, text: str) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(text)
    victim.refuses(adapter, "not valid JSON|was not written by leanlift")


def test_of_keys_that_stand_twice_the_last_counts(victim: Victim, tmp_path: Path) -> None:
    adapter = victim.put("own", tmp_path / "adapter")
    text = (adapter / "adapter_config.json").read_text()
    (adapter / "adapter_config.json").write_text(text.rstrip()[:-1] + ', "format_version": 99}')
    victim.refuses(adapter, "has adapter format 99")


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


def test_a_few_hundred_random_mutations() -> None:
    result = run_python("-m", "benchmarks.fuzz_adapter", "--count", "300", "--no_csv")
    assert result.returncode == 0, result.stdout + result.stderr
    loaded, refused, failed = map(int, result.stdout.split("\nall")[1].split()[:3])
    assert (loaded > 20, refused > 200, failed) == (True, True, 0)
