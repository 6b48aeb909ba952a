"""Files of a report that are damaged, or that anyone may have written."""

from __future__ import annotations

import copy
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from pages import check_page
from reported import ANSWERS, MEMORY, SETTINGS, STATE, put, whole
from sweeps import thorough

from benchmarks.adapter_mutations import MUTATIONS
from leanlift import UserError
from leanlift.report.adapter import read_adapter
from leanlift.report.data import read_run
from leanlift.report.page import page
from leanlift.report.text import report_text


def damage(adapter: Path, key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[key] = value(tensors[key]).contiguous()
    save_file(tensors, path)


NAME = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": ("values", lambda t: torch.full_like(t, float("nan")), "NaN or infinite"),
    "ints": ("values", lambda t: t.int(), "expected a 1-D floating tensor"),
    "short": ("values", lambda t: t[1:], "values"),
    "unsorted": ("index.columns", lambda t: t.flip(0), "is broken"),
    "twice": ("index.columns", lambda t: torch.full_like(t, 3), "not sorted or not distinct"),
    "outside": ("index.columns", lambda t: t.clamp(min=64), "is broken"),
    "rows": ("index.counts", lambda t: t[:-1], "expected counts as"),
    "floats": ("index.counts", lambda t: t.float(), "expected uint8"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_adapter_is_one_sentence(adapter: Path, tmp_path: Path, kind: str) -> None:
    part, value, said = DAMAGES[kind]
    copytree(adapter, tmp_path / "bad")
    damage(tmp_path / "bad", f"{NAME}.{part}", value)
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path / "bad")


def test_a_cut_file_is_one_sentence_wherever_it_is_cut(adapter: Path, tmp_path: Path) -> None:
    copytree(adapter, tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 4, 8, 100, header - 1, header, header + 1, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_adapter(tmp_path / "bad")
    weights.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(UserError, match="does not fit"):
        read_adapter(tmp_path / "bad")


# --- strangers' files ---------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, -1, 2.5, 10**30, float("nan"), float("inf"), "", "\x1b[2J", "a\nb", "x" * 10_000,
    "<script>alert(1)</script>", "\ud800", [], [1], {}, {"a": 1}, [[[]]], [{"step": 1, "loss": 1}],
]  # fmt: skip


def shown_or_refused(run: Path) -> str:
    """The sentence of a run that is refused; nothing for one that has a page."""
    try:
        check_page(page(read_run(run)))
    except UserError as error:
        return str(error)
    return ""


def test_a_mutated_adapter_is_shown_or_refused(adapter: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    outcomes: Counter[str] = Counter()
    for number in range(150):
        chance, damaged = random.Random(number), dict(files)
        chance.choice(MUTATIONS)(chance, damaged)
        for file in tmp_path.iterdir():
            file.unlink()
        for name, data in damaged.items():
            (tmp_path / name).write_bytes(data)
        said = shown_or_refused(tmp_path)
        outcomes["refused" if said else "shown"] += 1
        assert len(said) < 1500
    assert min(outcomes["shown"], outcomes["refused"]) > 10


def places_in(data: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [before] if before else []
    if isinstance(data, (dict, list)):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in list(items)[:8]:
            found += places_in(value, (*before, key))
    return found


@pytest.mark.parametrize(
    ("name", "original"),
    [
        thorough(("memory.json", whole(MEMORY))),
        ("trainer_state.json", STATE),
        thorough(("run.json", SETTINGS)),
        ("predictions.jsonl", ANSWERS),
    ],
    ids=["memory", "state", "settings", "answers"],
)
def test_files_that_lie_end_in_a_report_or_a_sentence(
    tmp_path: Path, name: str, original: Any
) -> None:
    """Every value replaced by every kind of value."""
    run, tried = put(tmp_path / "run"), 0
    for place in places_in(original):
        for value in HOSTILE:
            data = copy.deepcopy(original)
            holder = data
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            (run / name).write_text(json.dumps(data))
            found = read_run(run)
            text = report_text(found)
            assert "\x1b" not in text, (place, value)
            assert len(text) < 10_000, (place, value)
            tried += 1
            if tried % 7 == 0:
                check_page(page(found).encode("utf-8", "replace").decode())
    assert tried > 100
