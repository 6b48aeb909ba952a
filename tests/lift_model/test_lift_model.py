"""An attached model as people expect of an adapter model, in PEFT's words."""

from __future__ import annotations

import threading
from pathlib import Path

import peft
import pytest
import torch
from sweeps import swept
from tiny import load, make_checkpoint
from trained import KINDS, attached, logits, move, trained
from transformers import AutoModelForCausalLM

from leanlift import LiftModel, UserError, reference_model
from leanlift.layers import FrozenLinear
from leanlift.model import lift_layers, lift_state, lifted

IDS = torch.arange(3, 43).reshape(2, 20)


@pytest.mark.parametrize("kind", swept(KINDS, "nf4"))
def test_without_its_adapter_it_is_exactly_the_base(base: Path, tmp_path: Path, kind: str) -> None:
    wanted = logits(attached(base, kind))  # offsets are zero
    model = trained(base, tmp_path / "adapter", kind)
    assert isinstance(model, peft.PeftModel)
    assert model.peft_config["default"].lift is lift_state(model).config
    with_it = logits(model)
    assert not torch.equal(with_it, wanted)
    with model.disable_adapter():
        assert torch.equal(logits(model), wanted)
        with model.disable_adapter():
            assert torch.equal(logits(model), wanted)
        assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(model), with_it)
    model.base_model.disable_adapter_layers()
    assert torch.equal(logits(model), wanted)
    model.base_model.enable_adapter_layers()
    assert torch.equal(logits(model), with_it)
    with pytest.raises(ZeroDivisionError), model.disable_adapter():
        raise ZeroDivisionError
    assert torch.equal(logits(model), with_it)


def test_another_thread_computes_as_it_wants(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", "dense")
    with_it, found = logits(model), []
    with model.disable_adapter():
        thread = threading.Thread(target=lambda: found.append(logits(model)))
        thread.start()
        thread.join()
        without = logits(model)
    assert torch.equal(found[0], with_it)
    assert not torch.equal(without, with_it)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
def test_what_was_computed_without_it_is_gone_back_through_without_it(
    base: Path, tmp_path: Path, kind: str
) -> None:
    model, gradients = trained(base, tmp_path / "adapter", kind), {}
    embedded = model.get_input_embeddings()(IDS).detach()
    for name, other in {"zero": attached(base, kind), "off": model, "on": model}.items():
        given = embedded.clone().requires_grad_()
        if name == "off":
            with other.disable_adapter():
                out = other(inputs_embeds=given).logits
        else:
            out = other(inputs_embeds=given).logits
        out.float().square().mean().backward()
        gradients[name] = given.grad
        if name == "off":
            assert all(layer.values.grad is None for layer in lift_layers(model).values())
    assert torch.equal(gradients["off"], gradients["zero"])
    assert not torch.equal(gradients["on"], gradients["zero"])


def test_a_backward_pass_may_come_while_the_adapter_is_off(base: Path, tmp_path: Path) -> None:
    """A reference is computed between the forward and the backward pass of a policy."""
    model, gradients = trained(base, tmp_path / "adapter", "nf4"), []
    for inside in (False, True):
        loss = model(IDS, labels=IDS).loss
        if inside:
            with model.disable_adapter():
                loss.backward()
        else:
            loss.backward()
        gradients.append([layer.values.grad for layer in lift_layers(model).values()])
        model.zero_grad()
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


@pytest.mark.parametrize("kind", swept(KINDS, "nf4", "dense"))
def test_merged_for_a_while_it_computes_the_same_and_comes_back(
    base: Path, tmp_path: Path, kind: str
) -> None:
    model = trained(base, tmp_path / "adapter", kind)
    before = logits(model)
    model.merge_adapter()
    assert torch.allclose(logits(model), before, atol=1e-6, rtol=1e-5)
    taken = sum(layer.merged.nbytes for layer in lift_layers(model).values())
    assert taken == sum(4 * layer.index.shape[0] * layer.index.shape[1]
                        for layer in lift_layers(model).values())  # fmt: skip
    assert model(IDS, labels=IDS).loss.requires_grad is False
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(attached(base, kind)))
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("kind", swept(KINDS, "nf4", "dense"))
def test_merged_for_good_it_is_a_stock_model(
    base: Path, tmp_path: Path, kind: str, dtype: str | None
) -> None:
    model = trained(base, tmp_path / "adapter", kind)
    wanted = logits(model)
    stock = model.merge_and_unload(dtype=dtype)
    assert type(stock).__name__ == "LlamaForCausalLM"
    assert not any(isinstance(m, FrozenLinear) for m in stock.modules())
    assert {p.dtype for p in stock.parameters()} == {torch.float32 if dtype is None
                                                     else torch.bfloat16}  # fmt: skip
    near = {"atol": 1e-5, "rtol": 1e-5} if dtype is None else {"atol": 0.05, "rtol": 0.05}
    assert torch.allclose(logits(stock), wanted, **near)
    assert not hasattr(stock, "leanlift")
    stock.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").eval()
    assert torch.equal(logits(again), logits(stock))
    stock.train().requires_grad_(True)(IDS, labels=IDS).loss.backward()  # it trains as any other


def test_what_has_no_stock_form_is_not_merged_in_memory(base: Path) -> None:
    model = attached(base, "nf4", quantize_embeddings=True)
    move(model)
    before = logits(model)
    with pytest.raises(UserError, match=r"held in INT8.* merge_adapter\(adapter, output\)"):
        model.merge_and_unload()
    assert torch.equal(logits(model), before)
    with pytest.raises(UserError, match="dtype such as float16"):
        model.merge_and_unload(dtype="int8")
    with pytest.raises(UserError, match="set_adapter first"):
        model.merge_and_unload(adapter_names=["other"])


@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_trained_tokens_are_merged_for_good(tmp_path: Path, tied: bool) -> None:
    base = tmp_path / "base"
    make_checkpoint(base, tied=tied)
    model = attached(base, "dense", trainable_token_indices=(5, 98))
    move(model)
    wanted = logits(model)
    stock = model.merge_and_unload()
    assert torch.allclose(logits(stock), wanted, atol=1e-5)
    assert (stock.lm_head.weight is stock.model.embed_tokens.weight) == tied


def test_it_saves_and_loads_as_adapters_do(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "saved", safe_serialization=True, state_dict={})
    again = LiftModel.from_pretrained(load(base, "nf4+double"), tmp_path / "saved")
    assert torch.equal(logits(again), logits(model))
    assert not any(p.requires_grad for p in again.parameters())
    trainable = LiftModel.from_pretrained(
        load(base, "nf4+double"), tmp_path / "saved", is_trainable=True
    )
    assert trainable.get_nb_trainable_parameters() == model.get_nb_trainable_parameters()
    assert trainable.get_nb_trainable_parameters()[0] > 0
    with pytest.raises(UserError, match="never pickled"):
        model.save_pretrained(tmp_path / "no", safe_serialization=False)
    with pytest.raises(UserError, match="push the directory"):
        model.save_pretrained(tmp_path / "no", push_to_hub=True)
    model.save_pretrained(tmp_path / "no", is_main_process=False)
    assert not (tmp_path / "no").exists()
    with pytest.raises(UserError, match="does not know device_map"):
        LiftModel.from_pretrained(load(base), tmp_path / "saved", device_map="auto")


def test_peft_s_own_loader_says_that_it_is_none_of_its_kinds(base: Path, tmp_path: Path) -> None:
    trained(base, tmp_path / "adapter")
    with pytest.raises((KeyError, ValueError, TypeError)):
        peft.PeftModel.from_pretrained(load(base, "dense"), tmp_path / "adapter")


def test_a_reference_model_shares_everything_and_trains_nothing(base: Path, tmp_path: Path) -> None:
    model = trained(base, tmp_path / "adapter", "nf4")
    with model.disable_adapter():
        wanted = logits(model)
    reference = reference_model(model.train())
    assert not list(reference.parameters())
    assert not reference.state_dict()
    out = reference(IDS)
    assert torch.equal(out.logits.float(), wanted)
    assert not out.logits.requires_grad
    assert model.training
    assert lifted(model).training
    assert reference.config is model.config
    with pytest.raises(UserError, match="no leanlift layers"):
        reference_model(load(base, "dense"))
