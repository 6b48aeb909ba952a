"""Linears that keep the transpose of their matrix, as GPT-2's: trained, saved and merged as the
matrix [m, n], in whatever form they are held and stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import FORMATS, load, make_checkpoint_of
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, OpenAIGPTConfig
from transformers.pytorch_utils import Conv1D

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, merge_adapter
from leanlift import save_adapter as save
from leanlift.adapters import open_adapter
from leanlift.cli import main
from leanlift.evaluation.verify import verify_merged
from leanlift.export import export_peft
from leanlift.fingerprint import Segment
from leanlift.layers import FrozenLinear
from leanlift.model import freeze_quantized, lift_layers, lift_state
from leanlift.weights.kinds import is_dense_linear, is_plain_linear, is_turned_linear, matrix_of
from leanlift.weights.quantized import frozen_weight

SIZES: dict[str, Any] = {
    "vocab_size": 128, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
BASES = {"gpt2": GPT2Config(**SIZES), "openai-gpt": OpenAIGPTConfig(**SIZES)}
SHAPES = {"attn.c_attn": (192, 64), "attn.c_proj": (64, 64), "mlp.c_fc": (256, 64),
          "mlp.c_proj": (64, 256)}  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("bases")
    torch.manual_seed(0)
    return {name: make_checkpoint_of(config, place / name) for name, config in BASES.items()}


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model.eval()(input_ids=batch()["input_ids"]).logits
    return out


def trained(base: Path, kind: str, **config: Any) -> Any:
    return attached(load(base, kind), **config)


def attached(model: Any, **config: Any) -> Any:
    get_lift_model(model, LiftConfig(density=0.05, approx_rank=8, **config), progress=False)
    generator = torch.Generator().manual_seed(3)
    for layer in lift_layers(model).values():
        layer.values.data.copy_(0.05 * torch.randn(layer.values.shape, generator=generator))
    return model


def twin_of(model: Any, base: Path) -> Any:
    """The stock model with the effective weights of an attached one."""
    stock = load(base, "dense")
    for name, layer in model.named_modules():
        if isinstance(layer, FrozenLinear):
            rows = layer.effective_rows(0, layer.out_features, torch.float32)
            matrix_of(stock.get_submodule(name)).copy_(rows)
    return stock


@pytest.mark.parametrize("kind", swept(FORMATS, "nf4", "dense"))
@pytest.mark.parametrize("family", swept(BASES, "gpt2"))
def test_the_matrix_is_what_the_model_computes_with(
    bases: dict[str, Path], family: str, kind: str, tmp_path: Path
) -> None:
    """Loss and gradients are the dense model's; saved, loaded and merged it stays that model."""
    base = bases[family]
    model = trained(base, kind)
    layers = lift_layers(model)
    assert len(layers) == 8
    for name, layer in layers.items():
        assert layer.weight_tiles.shape == next(s for n, s in SHAPES.items() if name.endswith(n))
    stock = twin_of(model, base)
    loss, expected = model.train()(**batch()).loss, stock.train()(**batch()).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    for name, layer in layers.items():
        dense = stock.get_submodule(name).weight.grad.T
        wanted = dense.reshape(-1)[layer.index.to_flat()]
        off = (layer.values.grad - wanted).abs().max() / dense.abs().max()
        assert off <= 2e-5, name

    save(model, tmp_path / "adapter")
    again = load_adapter(load(base, kind), tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized",
                  progress=False)  # fmt: skip
    merged = load(tmp_path / "merged", "dense")
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", swept(["nf4", "dense"], "nf4"))
def test_a_merge_onto_the_original_adds_to_what_is_stored(
    bases: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    base = bases["gpt2"]
    model = trained(base, kind)
    save(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    before, after = (load_file(d / "model.safetensors") for d in (base, tmp_path / "merged"))
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    for name, layer in lift_layers(model).items():
        changed = torch.zeros(layer.weight_tiles.shape)
        layer.add_offsets_(changed, 0, layer.out_features)
        key = f"{name}.weight"
        torch.testing.assert_close(after.pop(key), before[key] + changed.T)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_a_merge_is_verified(bases: dict[str, Path], onto: str, tmp_path: Path) -> None:
    save(trained(bases["gpt2"], "nf4"), tmp_path / "adapter")
    (tmp_path / "rows.jsonl").write_text('{"text": "1 + 1 = 2, and so on"}\n' * 2)
    merged = merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto, progress=False)
    found = verify_merged(tmp_path / "adapter", merged, str(tmp_path / "rows.jsonl"))
    assert found.difference <= found.bound < found.effect


def test_a_checkpoint_of_the_backbone_alone_has_them_under_its_own_names(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    base = make_checkpoint_of(BASES["gpt2"], tmp_path / "base")
    tensors = load_file(bases["gpt2"] / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, base / "model.safetensors", metadata={"format": "pt"})
    model = trained(base, "nf4", target_modules="attn.c_proj")  # square: its shape says nothing
    name = "transformer.h.1.attn.c_proj"
    home = lift_state(model).base.layout.homes[f"{name}.weight"]
    assert home == (Segment("h.1.attn.c_proj.weight", 0, 64, turned=True),)
    save(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    change = load_file(tmp_path / "merged" / "model.safetensors")[home[0].name] - bare[home[0].name]
    changed = torch.zeros(64, 64)
    lift_layers(model)[name].add_offsets_(changed, 0, 64)
    torch.testing.assert_close(change, changed.T)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_base_on_disk_holds_the_matrix_itself(
    bases: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    """Its merge is a 16-bit checkpoint again, and so has the transpose."""
    stock = load(bases["gpt2"], kind)
    stock.save_pretrained(tmp_path / "base")
    model = attached(AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32))
    assert {layer.weight_tiles.format.kind for layer in lift_layers(model).values()} == {kind}
    save(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized",
                  progress=False)  # fmt: skip
    merged = load(tmp_path / "merged", "dense")
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)


def test_a_model_that_came_from_no_checkpoint_is_merged_onto_one(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    model = load(bases["gpt2"], "dense")
    model.config._name_or_path = ""
    get_lift_model(model, LiftConfig(approx_rank=8, target_modules="c_proj"), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    save(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", base=bases["gpt2"], dtype="float32",
                  progress=False)  # fmt: skip
    merged = load(tmp_path / "merged", "dense")
    torch.testing.assert_close(logits(merged), logits(model), atol=2e-5, rtol=0)


def test_there_is_no_peft_form_and_a_dry_run_finds_every_place(
    bases: dict[str, Path], tmp_path: Path, unplanned: None
) -> None:
    base = bases["gpt2"]
    save(trained(base, "dense"), tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter:
        assert adapter.base.layout.is_turned("transformer.h.0.mlp.c_fc")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert [1, 2, 3, True][3:] == data["base"]["layout"]["transformer.h.0.mlp.c_fc.weight"][0][3:]
    with pytest.raises(UserError, match=r"c_attn keeps the transpose .* merge it instead"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert not (tmp_path / "peft").exists()
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1", "completion": "2"}\n' * 4)
    command = ["train", "--model_name_or_path", str(base), "--dataset_name", str(rows)]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--approx_rank", "8"]
    assert main([*command, "--dry_run"]) == 0


class Written(nn.Module):
    """The same of another name, as long as it adds nothing."""

    def __init__(self, m: int, n: int, more: float = 0.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(n, m)), nn.Parameter(torch.randn(m))
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias + self.more


class Adding(Written):
    def __init__(self, m: int, n: int) -> None:
        super().__init__(m, n, 1.0)


@pytest.mark.parametrize(
    ("one", "turned"),
    [(Conv1D(4, 4), True), (Written(4, 4), True), (Adding(4, 4), False), (nn.Linear(4, 4), False),
     (nn.Embedding(4, 4), False), (nn.Conv1d(4, 4, 1), False), (nn.ReLU(), False)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_whether_a_class_keeps_the_transpose_is_tried(one: nn.Module, turned: bool) -> None:
    state = torch.get_rng_state()
    assert is_turned_linear(one) == turned
    assert is_dense_linear(one) == (turned or is_plain_linear(one))
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_are_those_of_the_transpose_and_new_each_time() -> None:
    one = Conv1D(6, 4)
    weight = frozen_weight(one)
    assert weight.shape == (6, 4)
    rows = weight.rows(2, 5)
    assert torch.equal(rows, one.weight[:, 2:5].T)
    assert rows.is_contiguous()
    rows.zero_()
    assert weight.rows(2, 5).abs().min() > 0


def test_an_adapter_goes_onto_a_model_that_is_computed_with_already(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    """Its layers hold the weights, and know how those are stored."""
    model = trained(bases["gpt2"], "nf4")
    save(model, tmp_path / "adapter")
    stock = load(bases["gpt2"], "nf4")
    freeze_quantized(stock)
    again = load_adapter(stock, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    assert lift_state(again).base.layout == lift_state(model).base.layout
