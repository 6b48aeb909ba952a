"""An adapter is a file from the internet: each way in which one can lie has its sentence."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from victim import NAME, RETIRED, WEIGHTS, Victim, at, edit_json, edit_tensors, set_at

from leanlift import (
    UserError,
)
from leanlift.adapters import open_adapter
from leanlift.measure import LiveBytes

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
    "nan-retired": ("own", {f"{RETIRED}__values": at(0, float("nan"))}, "NaN or infinite"),
    "row-outside": ("peft", {"shira_indices": at((0, 0), 64)}, "positions outside its 64x64"),
    "row-negative": ("peft", {"shira_indices": at((0, 0), -1)}, "positions outside its 64x64"),
    "column-far-outside": ("bare", {"shira_indices": at((1, 0), 2**31 - 1)}, "positions outside"),
    "peft-unsorted": ("peft", {"shira_indices": lambda t: t.flip(1)}, "other entries than"),
    "peft-duplicated": ("peft", {"shira_indices": at((slice(None), 1), 0)}, "positions of .* are"),
    "peft-float-indices": ("peft", {"shira_indices": lambda t: t.float()}, "expected int32"),
    "peft-too-few": ("bare", {"shira_weight": lambda t: t[1:]}, "expected int32 \\(2"),
    "peft-nan": ("bare", {"shira_weight": at(0, float("nan"))}, "NaN or infinite"),
    "super-outside": ("super", {"_indices": at(0, 64 * 64)}, "positions outside its 64x64"),
    "super-negative": ("super bare", {"_indices": at(0, -1)}, "positions outside its 64x64"),
    "super-unsorted": ("super", {"_indices": lambda t: t.flip(0)}, "other entries than"),
    "super-duplicated": ("super", {"_indices": at(1, 0)}, "positions of .* are broken"),
    "super-floats": ("super", {"_indices": lambda t: t.float()}, "expected int32"),
    "super-pairs": ("super bare", {"_indices": lambda t: t.expand(2, -1)}, "expected int32"),
    "super-too-few": ("super bare", {"_values": lambda t: t[1:]}, "expected int32"),
    "super-fewer": (
        "super bare",
        {"_values": lambda t: t[1:], "_indices": lambda t: t[1:]},
        "entries, but .* by its adapter_config",
    ),
    "super-none": ("super bare", {"_indices": lambda t: None}, "lacks .*supertuning_indices"),
    "super-nan": ("super", {"_values": at(0, float("nan"))}, "NaN or infinite"),
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
        tensors[f"{NAME}.{RETIRED}.{part}"] = tensors[f"{NAME}.{part}"].clone()
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


FACTS = {"own": "adapter_config.json", "peft": "leanlift.json", "super": "leanlift.json"}
"""Where an adapter of each form says what it is."""

BAD_NAMES = ["../x", "a/../../b", "/etc/passwd", "", "model..norm", "a\0b"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_climb_are_refused(victim: Victim, tmp_path: Path, name: str) -> None:
    adapter = victim.put("own", tmp_path / "adapter")

    def rename(data: Any) -> None:
        data["base"]["shapes"][name] = data["base"]["shapes"].pop(NAME)

    edit_json(adapter / "adapter_config.json", rename)
    victim.refuses(adapter, "expected the name of a module")


@pytest.mark.parametrize("name", ["__class__", "model.norm", "model", "lm_head", f"{NAME}.base"])
@pytest.mark.parametrize("form", ["own", "peft", "bare", "super", "super bare"])
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

    if "bare" not in form:
        edit_json(adapter / FACTS[form], rename)
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
    "parts-a-list": (set_at("base", "parts", []), "how many experts"),
    "parts-of-others": (set_at("base", "parts", {"model": 2}), "experts of model"),
    "parts-that-do-not-fit": (set_at("base", "parts", {NAME: 3}), f"experts of {NAME}"),
    "parts-none": (set_at("base", "parts", {NAME: 0}), f"experts of {NAME}"),
    "parts-boolean": (set_at("base", "parts", {NAME: True}), f"experts of {NAME}"),
    "shapes-a-list": (set_at("base", "shapes", []), "shapes of trained matrices"),
    "name-control": (set_at("base", "name", "\x1b[2J"), "the name of the base"),
    "name-surrogate": (set_at("base", "name", "\ud800"), "the name of the base"),
    "name-a-number": (set_at("base", "name", 3), "the name of the base"),
    "sampled-climbs": (set_at("base", "sampled", ["../x"]), "names of sampled tensors"),
    "base-a-list": (set_at("base", []), "expected the keys"),
    "lift-a-string": (set_at("lift", "all"), "expected the keys of a LiftConfig"),
    "density-text": (set_at("lift", "density", "0.05"), "density as a number"),
    "density-nan": (set_at("lift", "density", float("nan")), r"density as a number in \(0, 1\]"),
    "seed-huge": (set_at("lift", "selection_seed", 2**63), "selection_seed as a whole number"),
    "limit-huge": (set_at("lift", "retired_limit", 1e308), "retired_limit as a number, 0 or more"),
    "pattern-flags": (set_at("lift", "density_pattern", {"(?i)a": 0.1}), "no regular expression"),
    "refreshes": (set_at("refreshes", -1), "a count of refreshes"),
    "version": (set_at("format_version", [1]), "has adapter format"),
}


@pytest.mark.parametrize("case", CONFIG_CASES)
@pytest.mark.parametrize("form", ["own", "peft"])
def test_configurations_that_lie(victim: Victim, tmp_path: Path, form: str, case: str) -> None:
    change, match = CONFIG_CASES[case]
    adapter = victim.put(form, tmp_path / "adapter")
    edit_json(adapter / FACTS[form], change)
    victim.refuses(adapter, match)


@pytest.mark.parametrize("form", FACTS)
def test_shapes_that_no_tensor_backs_are_not_allocated(
    victim: Victim, tmp_path: Path, form: str
) -> None:
    adapter = victim.put(form, tmp_path / "adapter")
    config = adapter / FACTS[form]
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
