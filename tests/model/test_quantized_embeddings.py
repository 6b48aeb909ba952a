"""Embedding and head in 8 bits, and an embedding on the CPU, in a model that trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runs import LIFT, assert_same_layers, sparse_trainer
from tiny import load, make_checkpoint
from transformers import AutoModelForCausalLM

from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.measure import tensor_bytes
from leanlift.model import embedding_to_cpu
from leanlift.model.embeddings import embeddings_nbytes
from leanlift.weights.places import weight_tensors

ENDS = LiftConfig(density=0.1, approx_rank=8, quantize_embeddings=True)


def logits_of(model: Any) -> torch.Tensor:
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_quantized_embeddings_train_save_load_and_merge(tmp_path: Path, tied: bool) -> None:
    path = make_checkpoint(tmp_path / "base", tied=tied)
    trainer = sparse_trainer(path, tmp_path / "run", ENDS, max_steps=20, learning_rate=1e-2)
    losses = trainer.train()
    assert losses.training_loss < 4.5
    model = trainer.model
    embedding = model.get_input_embeddings().weight
    assert embedding.dtype == torch.int8
    assert (embedding.data_ptr() == model.get_output_embeddings().base.weight.data_ptr()) == tied
    save_adapter(model, tmp_path / "adapter")
    live = logits_of(model)
    assert torch.equal(logits_of(load_adapter(load(path), tmp_path / "adapter")), live)
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    torch.testing.assert_close(logits_of(merged), live, rtol=1e-4, atol=1e-4)
    assert merged.config.tie_word_embeddings == tied
    merge_adapter(tmp_path / "adapter", tmp_path / "plain", dtype="float32", onto="original")
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    assert torch.equal(original.get_input_embeddings().weight, stock.get_input_embeddings().weight)


def test_an_embedding_on_the_cpu_changes_nothing_but_its_place(tmp_path: Path) -> None:
    untied = make_checkpoint(tmp_path / "untied", tied=False)
    usual = sparse_trainer(untied, tmp_path / "a", LIFT)
    apart = sparse_trainer(untied, tmp_path / "b", LIFT)
    embedding_to_cpu(apart.model)
    assert "storage" not in dict(apart.model.get_input_embeddings().named_children())
    usual.train()
    apart.train()
    assert_same_layers(usual.model, apart.model)
    tied = make_checkpoint(tmp_path / "tied", tied=True)
    with pytest.raises(UserError, match="tied to the output head"):
        embedding_to_cpu(get_lift_model(load(tied), LIFT, progress=False))


@pytest.mark.parametrize("elsewhere", [False, True], ids=["", "on the cpu"])
@pytest.mark.parametrize("in_int8", [False, True], ids=["stock", "int8"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_bytes_from_the_shapes_are_those_of_the_tensors(
    tmp_path: Path, tied: bool, in_int8: bool, elsewhere: bool
) -> None:
    path = make_checkpoint(tmp_path, tied=tied)
    model, config = load(path), LiftConfig(approx_rank=4, quantize_embeddings=in_int8)
    rule = embeddings_nbytes(model, in_int8, elsewhere)
    parts = model.get_input_embeddings(), model.get_output_embeddings()
    assert rule.loaded == tensor_bytes([part.weight for part in parts])
    get_lift_model(model, config, progress=False)
    if not (tied and elsewhere):  # which is refused
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        both = [getattr(embedding, "storage", embedding), getattr(head, "base", head)]
        held = [tensor for part in both[elsewhere:] for tensor in weight_tensors(part)]
        assert rule.held == tensor_bytes(held)
