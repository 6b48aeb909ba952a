"""Bytes are counted, not estimated."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny import load, make_checkpoint

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.io.measured import load_report
from leanlift.measure import (
    LiveBytes,
    MemoryMeter,
    format_report,
    human,
    save_report,
    static_categories,
)
from leanlift.model import lift_layers, lift_state, refresh_mask


def test_live_bytes_follow_a_known_sequence() -> None:
    kept = torch.zeros(1000)
    with LiveBytes() as live:
        a = kept + 1  # 4000
        b = a.view(10, 100).T  # a view: nothing
        c = torch.cat([a, a])  # 8000
        assert live.current == 12000
        del a
        assert live.current == 12000, "b still holds the storage"
        del b
        assert live.current == 8000
        kept.add_(1)
        c[:10].mul_(2)
        assert (live.current, live.peak) == (8000, 12000)
        del c
        assert live.current == 0
    assert live.peak == 12000


def test_live_bytes_leave_meta_tensors_out() -> None:
    with LiveBytes() as live:
        skeleton = torch.empty(1000, 1000, device="meta").half()
        assert live.peak == 0
        torch.empty_like(skeleton, device="cpu")
        assert live.peak == skeleton.nbytes


def test_live_bytes_leave_mapped_files_out(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(100, 100)}, tmp_path / "a.safetensors")
    with LiveBytes() as live, safe_open(tmp_path / "a.safetensors", "pt") as opened:
        rows = opened.get_slice("a")[10:90]
        rows = rows.view(-1)[:4000].view(40, 100)
        assert live.current == 0
        copied = rows + 1
        assert live.current == live.peak == copied.nbytes


def test_live_bytes_count_both_parts_of_a_sparse_tensor() -> None:
    places, values = torch.zeros(2, 100, dtype=torch.int64), torch.ones(100)
    with LiveBytes() as live:
        sparse = torch.sparse_coo_tensor(places, values, (9, 9), check_invariants=True)
        assert live.current == 0, "it holds what was there"
        doubled = sparse * 2
        assert live.current == doubled._indices().nbytes + doubled._values().nbytes


def test_live_bytes_see_the_backward_pass() -> None:
    w = torch.ones(100, 100, requires_grad=True)
    with LiveBytes() as live:
        (torch.ones(1, 100) @ w).sum().backward()
    assert w.grad is not None
    assert live.current == w.grad.nbytes
    assert live.peak >= w.grad.nbytes


@pytest.mark.parametrize("kind", ["nf4+double", "nf4", "fp4", "int8", "dense"])
def test_static_bytes_are_those_of_the_storage_formats(tmp_path: Path, kind: str) -> None:
    """Each category against the formats' own rules, from shapes alone."""
    base = make_checkpoint(tmp_path, tied=False, hidden=64, intermediate=192)
    model = get_lift_model(load(base, kind), LiftConfig(approx_rank=8), progress=False)
    layers = lift_layers(model)
    formats = lift_state(model).base.formats
    got = static_categories(model)
    rule = sum(
        formats[name].nbytes((layer.out_features, layer.in_features))
        for name, layer in layers.items()
    )
    tables = 0
    if "4" in kind:  # per matrix 16 fp32 codes; with double quantization 256 more
        tables = (64 + (1024 if kind.endswith("double") else 0)) * len(layers)
    assert got["base weights"] == rule + tables
    entries = sum(layer.index.count for layer in layers.values())
    assert got["values"] == 4 * entries
    assert got["index"] == sum(layer.index.nbytes for layer in layers.values())
    assert got["retired entries"] == got["gradients"] == got["scratch"] == 0
    assert got["embeddings and head"] == 2 * model.config.vocab_size * 64 * 4
    assert got["norms and other"] >= 5 * 64 * 4
    for layer in layers.values():
        layer.values.data.normal_()
    refresh_mask(model)
    retired = [layer for layer in layers.values() if layer.retired_index is not None]
    assert static_categories(model)["retired entries"] == sum(
        layer.retired_index.nbytes + 4 * layer.retired_index.count for layer in retired
    )


def test_a_report_is_written_read_and_printed(tmp_path: Path) -> None:
    meter = MemoryMeter(torch.device("cpu"))
    with meter.phase("select", follow=True, static=1000) as peak:
        torch.zeros(256).add(1)
    assert peak.tensors == 1000 + 2048
    assert peak.resident is not None
    assert peak.resident > 2**20
    meter.report.categories = {"base weights": 3 * 2**20, "index": 2**20}
    save_report(meter.report, tmp_path)
    report = load_report(tmp_path)
    assert json.loads((tmp_path / "memory.json").read_text()) == report
    text = format_report(report)
    assert "75 %" in text
    assert "4.00 MiB" in text
    assert "select entries" in text


def test_a_missing_or_broken_report_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no memory\.json"):
        load_report(tmp_path)
    (tmp_path / "memory.json").write_text("{}")
    with pytest.raises(UserError, match="is no memory report"):
        load_report(tmp_path)


def test_human_sizes() -> None:
    sizes = [None, 0, 1023, 1024, 3 * 2**20, 5 * 2**40]
    assert [human(n) for n in sizes] == [
        "-",
        "0 B",
        "1023 B",
        "1.00 KiB",
        "3.00 MiB",
        "5120.00 GiB",
    ]
