"""An attached model in the hands of torch, transformers and others: right, or refused."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept
from tiny import load
from trained import KINDS
from transformers import Trainer, TrainingArguments

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, refresh_mask, save_adapter
from leanlift.model import claim, lift_layers, lift_state, lifted


def attached(base: Path, kind: str = "nf4", seed: int = 0, **config: Any) -> Any:
    settings = LiftConfig(approx_rank=8, selection_seed=seed, **config)
    model = get_lift_model(load(base, kind), settings, progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    return model


IDS = torch.arange(3, 43).reshape(2, 20)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


@pytest.mark.parametrize("refreshed", [False, True], ids=["fresh", "refreshed"])
@pytest.mark.parametrize("ends", [False, True], ids=["ends", "ends-int8"])
@pytest.mark.parametrize("kind", swept(KINDS, "nf4+double"))
def test_copies_compute_the_same_and_are_apart(
    base: Path, tmp_path: Path, kind: str, ends: bool, refreshed: bool
) -> None:
    model = attached(base, kind, quantize_embeddings=ends)
    if refreshed:
        refresh_mask(model)
    expected = logits(model)  # scratch buffers are there now
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(file, weights_only=False),
    }
    for how, other in copies.items():
        assert torch.equal(logits(other), expected), how
        for layer in lift_layers(other).values():
            layer.values.data.zero_()
        assert torch.equal(logits(model), expected), how
        assert not torch.equal(logits(other), expected), how
        other.train()(IDS, labels=IDS).loss.backward()
        assert all(layer.values.grad is not None for layer in lift_layers(other).values())
        save_adapter(other, tmp_path / how)
        other.print_trainable_parameters()
        with pytest.raises(UserError, match="save_adapter"):
            lifted(other).save_pretrained(tmp_path / "no")
    assert lift_state(copies["pickle"]).config == lift_state(model).config


def test_a_stock_save_is_refused_before_it_writes(base: Path, tmp_path: Path) -> None:
    model = lifted(attached(base))  # not what get_lift_model returned
    arguments = TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to="none")
    trainer = Trainer(model=model, args=arguments)
    for save in (model.save_pretrained, model.push_to_hub, trainer.save_model):
        with pytest.raises(UserError, match=r"save_adapter\(model, directory\)"):
            save(str(tmp_path / "saved"))
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in left if path.suffix in (".safetensors", ".bin")], left


@pytest.mark.parametrize("kind", swept(KINDS, "dense", "nf4"))
def test_a_state_dict_brings_its_positions_along(base: Path, kind: str) -> None:
    model = attached(base, kind, density=0.1)
    for change in (False, True):
        if change:
            refresh_mask(model)  # there are retired entries now
            assert any(layer.retired_nbytes for layer in lift_layers(model).values())
        saved = {key: copy.deepcopy(value) for key, value in model.state_dict().items()}
        others = {
            "same": attached(base, kind, density=0.1),
            "seed": attached(base, kind, density=0.1, selector="random", seed=7),
            "refreshed": attached(base, kind, density=0.1),
        }
        refresh_mask(others["refreshed"])
        for how, other in others.items():
            parameters = [id(layer.values) for layer in lift_layers(other).values()]
            other.load_state_dict(saved)
            assert torch.equal(logits(other), logits(model)), how
            assert [id(layer.values) for layer in lift_layers(other).values()] == parameters
            again = other.state_dict()
            assert all(torch.equal(again[key], saved[key]) for key in trained_keys(saved)), how


def trained_keys(state: dict[str, Any]) -> list[str]:
    found = [key for key in state if ".index." in key or key.endswith(".values")]
    retired = any(int(state[key]) for key in state if key.endswith(".settled_count"))
    assert any(".settled." in key for key in found) == retired
    return found


def test_values_without_their_positions_are_not_taken(base: Path) -> None:
    model = attached(base, "dense", density=0.1)
    state, before = model.state_dict(), logits(model)
    one = next(key for key in state if key.endswith("q_proj.index.columns"))
    wrong = {
        "is missing": {key: value for key, value in state.items() if key != one},
        "sorted|segment|counts say": {**state, one: torch.zeros_like(state[one])},
        "counts say": {**state, one: state[one][1:]},
    }
    for match, given in wrong.items():
        with pytest.raises(RuntimeError, match=match):
            model.load_state_dict(given, strict=False)
        assert torch.equal(logits(model), before)
    other = attached(base, "dense", density=0.2)
    with pytest.raises(RuntimeError, match=r"expected \d+ entries, got"):
        other.load_state_dict(state)
    prefix = one.removesuffix("index.columns")
    rest = {key: value for key, value in state.items() if not key.startswith(prefix)}
    assert f"{prefix}values" in model.load_state_dict(rest, strict=False).missing_keys


ENDS: list[dict[str, Any]] = [{}, {"quantize_embeddings": True}, {"trainable_token_indices": (5,)}]


@pytest.mark.parametrize("config", ENDS, ids=["plain", "INT8", "tokens"])
def test_an_embedding_keeps_its_rows(base: Path, config: dict[str, Any]) -> None:
    """More would be in no adapter, and gone when it is loaded."""
    model = attached(base, **config)
    before, rows = logits(model), model.get_input_embeddings().weight.shape[0]
    for unchanged in (None, rows):
        model.resize_token_embeddings(unchanged)
    for other in (rows + 8, rows - 8):
        with pytest.raises(UserError, match=r"attach it with embedding_rows=len\(tokenizer\)"):
            model.resize_token_embeddings(other, mean_resizing=False)
    model.tie_weights()
    assert torch.equal(logits(model), before)
    if "quantize_embeddings" not in config:
        stock = model.merge_and_unload()
        stock.resize_token_embeddings(rows + 8, mean_resizing=False)
        assert logits(stock).shape[-1] == rows + 8


def test_no_dtype_is_changed_of_what_is_trained(base: Path) -> None:
    model = attached(base, "dense", density=0.1)
    refresh_mask(model)
    before = {n: copy.deepcopy(layer.worn.learned) for n, layer in lift_layers(model).items()}
    for change in (model.half, model.bfloat16, lambda: model.to(torch.float16)):
        change()
        for name, layer in lift_layers(model).items():
            for one, other in zip(layer.learned.stores, before[name].stores, strict=True):
                assert torch.equal(one.values, other.values), name
    assert next(model.get_base_model().model.norm.parameters()).dtype == torch.float16


NEEDS = [
    (
        {"refresh_interval": 5},
        "the mask is chosen again every 5 steps by LiftTrainer or LiftCallback",
    ),
    ({"values_dtype": "bfloat16"}, "small updates of bfloat16 values are kept by LiftTrainer or"),
    ({"refresh_interval": 5, "values_dtype": "bfloat16"}, "every 5 steps and small updates"),
]


@pytest.mark.parametrize(("config", "match"), NEEDS, ids=["refresh", "bf16", "both"])
def test_what_only_our_trainer_does_is_asked_of_nobody_else(
    base: Path, tmp_path: Path, config: dict[str, Any], match: str
) -> None:
    model = attached(base, **config)
    logits(model)
    model.train()
    with torch.no_grad():
        model(IDS, labels=IDS)
    with pytest.raises(UserError, match=match):
        model(IDS, labels=IDS)
    rows = [{"input_ids": IDS[0], "labels": IDS[0]}]
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    with pytest.raises(UserError, match=match):
        Trainer(model=model, args=arguments, train_dataset=rows).train()
    claim(model)
    model(IDS, labels=IDS).loss.backward()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(base, "nf4"), tmp_path / "adapter").train()
    with pytest.raises(UserError, match=match):
        again(IDS, labels=IDS)


def test_a_plain_loop_over_plain_settings_is_fine(base: Path) -> None:
    model = attached(base).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(5):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
