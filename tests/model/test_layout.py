"""A checkpoint under other names than the model's, with matrices fused and cut: found at attach,
kept in the adapter, merged into the tensors that are there."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint
from torch import nn
from transformers import conversion_mapping, core_model_loading
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    Transpose,
    WeightConverter,
    WeightRenaming,
)

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, merge_adapter
from leanlift import save_adapter as save
from leanlift.adapters import open_adapter
from leanlift.cli import main
from leanlift.fingerprint import Segment
from leanlift.model import lift_layers, lift_state

Tensors = dict[str, torch.Tensor]


def conversions() -> list[Any]:
    """Of a library that stores a Llama in its own way."""
    kv, both = ["self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]
    split = getattr(core_model_loading, "Split", Chunk)  # which older releases do not have
    return [
        WeightRenaming("backbone.blocks", "model.layers"),
        WeightRenaming("backbone.wte", "model.embed_tokens"),
        WeightConverter("attn.kv", kv, [Chunk(dim=0)]),
        WeightConverter("ffn.both", both, [split(dim=0)]),
        WeightConverter(["ffn.down_a", "ffn.down_b"], "mlp.down_proj", [Concatenate(dim=0)]),
    ]


def stored_otherwise(tensors: Tensors) -> Tensors:
    """A checkpoint of a tiny Llama as that library writes it."""
    out: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        before = f"backbone.blocks.{layer}"
        if rest == "self_attn.k_proj.weight":
            parts = [tensor, tensors[name.replace("k_proj", "v_proj")]]
            out[f"{before}.attn.kv.weight"] = torch.cat(parts)
        elif rest == "mlp.gate_proj.weight":
            parts = [tensor, tensors[name.replace("gate_proj", "up_proj")]]
            out[f"{before}.ffn.both.weight"] = torch.cat(parts)
        elif rest == "mlp.down_proj.weight":
            for part, rows in (("a", tensor[:24]), ("b", tensor[24:])):
                out[f"{before}.ffn.down_{part}.weight"] = rows.clone()
        elif rest in ("self_attn.v_proj.weight", "mlp.up_proj.weight"):
            continue
        else:
            name = name.replace("model.layers", "backbone.blocks")
            out[name.replace("model.embed_tokens", "backbone.wte")] = tensor
    return out


def register(patch: pytest.MonkeyPatch, make: Callable[[], list[Any]]) -> None:
    """Let transformers load a Llama by these conversions."""
    known = conversion_mapping.get_checkpoint_conversion_mapping

    def mapping(kind: str) -> Any:
        return make() if kind == "llama" else known(kind)

    patch.setattr(conversion_mapping, "get_checkpoint_conversion_mapping", mapping)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkpoint in its own form, `plain`, and in the other library's, `foreign`."""
    place = tmp_path_factory.mktemp("checkpoints")
    plain = make_checkpoint(place / "plain")
    tensors = stored_otherwise(load_file(plain / "model.safetensors"))
    foreign = make_checkpoint(place / "foreign")
    save_file(tensors, foreign / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture
def foreign(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    register(monkeypatch, conversions)
    return checkpoints / "foreign"


def trained(base: Path, kind: str, **config: Any) -> Any:
    model = load(base, kind)
    get_lift_model(model, LiftConfig(density=0.05, approx_rank=8, **config), progress=False)
    torch.manual_seed(5)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=torch.arange(24).view(2, 12)).logits
    return out


@pytest.mark.parametrize(("kind", "onto"), [("dense", "original"), ("nf4", "quantized")])
def test_what_is_stored_otherwise_is_trained_saved_and_merged(
    foreign: Path, tmp_path: Path, kind: str, onto: str
) -> None:
    plain = foreign.parent / "plain"
    model, twin = trained(foreign, kind), trained(plain, kind)
    assert torch.equal(logits(model), logits(twin))
    assert not lift_state(twin).base.layout
    save(model, tmp_path / "adapter")
    again = load_adapter(load(foreign, kind), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), logits(model))

    options = {"dtype": "float32", "onto": onto, "progress": False}
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", **options)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == load_file(foreign / "model.safetensors").keys()
    stock = load(tmp_path / "merged", "dense").eval()
    torch.testing.assert_close(logits(stock), logits(model), atol=2e-5, rtol=0)

    save(twin, tmp_path / "twin")
    merge_adapter(tmp_path / "twin", tmp_path / "twin-merged", **options)
    expected = stored_otherwise(load_file(tmp_path / "twin-merged" / "model.safetensors"))
    for name, tensor in expected.items():
        assert torch.equal(merged[name], tensor), name


def test_the_adapter_says_where_its_matrices_are(foreign: Path, tmp_path: Path) -> None:
    model = trained(foreign, "dense", target_modules=("v_proj", "down_proj"))
    save(model, tmp_path / "adapter")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["format_version"] == 4
    assert main(["info", str(tmp_path / "adapter")]) == 0
    with open_adapter(tmp_path / "adapter") as adapter:
        layout = adapter.base.layout
    v, rows = "model.layers.1.self_attn.v_proj.weight", 32
    assert layout.homes[v] == (Segment("backbone.blocks.1.attn.kv.weight", rows, rows),)
    down = layout.homes["model.layers.0.mlp.down_proj.weight"]
    assert [(part.first, part.rows) for part in down] == [(0, 24), (0, 40)]
    assert layout.names["model.embed_tokens.weight"] == "backbone.wte.weight"
    assert not any("k_proj" in name or "up_proj" in name for name in layout.homes)


def test_what_no_operation_on_rows_makes_is_refused_before_it_is_selected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_checkpoint(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in [name for name in tensors if name.endswith("down_proj.weight")]:
        tensors[name.replace("down_proj", "turned")] = tensors.pop(name).T.contiguous()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    register(
        monkeypatch,
        lambda: [WeightConverter("mlp.turned.weight", "mlp.down_proj.weight", [Transpose(0, 1)])],
    )
    model = load(base, "dense")
    monkeypatch.setattr("leanlift.model.attach.selection", lambda *a: pytest.fail("selected"))
    with pytest.raises(UserError, match=r"down_proj\.weight .* could be trained but not merged"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


class Blocks(nn.Module):
    """Blocks alone, which no library has made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(64)
        self.layers = nn.ModuleList([nn.ModuleDict({"proj": nn.Linear(64, 32)})])


def test_a_module_of_ones_own_without_a_head_is_saved_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Blocks()
    twin = copy.deepcopy(model)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    (layer,) = lift_layers(model).values()
    layer.values.data.normal_()
    save(model, tmp_path / "adapter")
    load_adapter(twin, tmp_path / "adapter")
    (again,) = lift_layers(twin).values()
    assert torch.equal(again.values, layer.values)


def test_a_dry_run_finds_them_too(foreign: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1", "completion": "2"}\n' * 4)
    command = ["train", "--model_name_or_path", str(foreign), "--dataset_name", str(rows)]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--approx_rank", "8"]
    assert main([*command, "--dry_run"]) == 0
