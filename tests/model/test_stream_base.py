"""A base whose blocks come from the host: the same to the bit as one that is there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from sweeps import swept
from tiny import load
from torch import nn

from leanlift import LiftConfig, UserError, get_lift_model, load_adapter, save_adapter
from leanlift.measure import static_categories
from leanlift.model import claim, lift_layers, lifted, refresh_mask, stream_base
from leanlift.model.streaming import layers_by_block, pool_of
from leanlift.streaming import BUFFERS

CPU, LAYERS = torch.device("cpu"), 4
BASES = ("llama", "gpt2, turned", "qwen3, experts", "gpt-oss, experts", "phi3, fused", "gemma2")
IDS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated"),
    pytest.mark.usefixtures("spoilt_buffers"),
]


def trained(path: Path, kind: str, when: str, checkpointing: bool) -> tuple[list[float], Any, Any]:
    """Losses of a few steps with a refresh between them, the model, and its pool."""
    torch.manual_seed(0)
    model, pool = load(path, kind), None
    if when == "before":
        pool = stream_base(model, CPU)
    model = get_lift_model(model, LiftConfig(approx_rank=8, refresh_interval=2), progress=False)
    claim(lifted(model))
    if when == "after":
        pool = stream_base(model, CPU)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    values = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.AdamW(values, 1e-2), []
    for step in range(3):
        loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().item())
        if step == 1:
            refresh_mask(model, optimizer)
    return losses, model.eval(), pool


@pytest.mark.parametrize("checkpointing", swept([True, False], True))
@pytest.mark.parametrize("when", swept(["before", "after"], "before"))
@pytest.mark.parametrize("kind", swept(["nf4+double", "nf4", "int8", "dense"], "nf4+double"))
@pytest.mark.parametrize("family", swept(BASES, "llama"))
@torch.no_grad
def test_training_answering_saving_and_loading_are_the_same(
    family: str, kind: str, when: str, checkpointing: bool, deep_base, tmp_path: Path
) -> None:
    with torch.enable_grad():
        wanted, resident, none = trained(deep_base(family), kind, "", checkpointing)
        found, streamed, pool = trained(deep_base(family), kind, when, checkpointing)
    assert none is None
    assert pool is pool_of(streamed)
    assert found == wanted
    ask = {"input_ids": IDS, "use_cache": False}
    assert torch.equal(streamed(**ask).logits, resident(**ask).logits)
    said = [m.generate(IDS[:1], max_new_tokens=4, do_sample=False) for m in (streamed, resident)]
    assert torch.equal(*said)
    files = []
    for name, model in (("streamed", streamed), ("resident", resident)):
        save_adapter(model, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    again = load(deep_base(family), kind)
    stream_base(again, CPU)
    again = load_adapter(again, tmp_path / "streamed")
    assert torch.equal(again(**ask).logits, resident(**ask).logits)
    assert pool.copies > len(pool.blocks)


def test_each_pass_copies_what_two_buffers_do_not_hold(deep_base) -> None:
    _, model, pool = trained(deep_base("llama"), "nf4+double", "before", True)
    model.train()
    for _ in range(2):
        before = pool.copies
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert pool.copies - before == 2 * (len(pool.blocks) - BUFFERS) == 4


def test_what_computes_is_on_the_device_and_the_rest_stays(deep_base) -> None:
    """`model.to` moves what is the device's, and no block."""
    model = load(deep_base("llama"), "dense")
    pool = stream_base(model, CPU)
    model = get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    before = [block.host.data_ptr() for block in pool.blocks]
    layer = next(iter(lift_layers(model).values()))
    weight = layer.base.weight
    model.to(torch.float64)
    assert layer.base.weight is weight
    assert weight.dtype == torch.float32
    assert [block.host.data_ptr() for block in pool.blocks] == before
    assert lifted(model).model.norm.weight.dtype == torch.float64
    assert stream_base(model, CPU) is pool


def test_a_weight_that_a_model_asks_for_is_where_it_computes(deep_base) -> None:
    """Some models put what they compute where a weight of theirs is."""
    model = load(deep_base("llama"), "dense")
    pool = stream_base(model, CPU)
    model = get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    layers = list(lift_layers(model).values())
    for layer in (layers[-1], layers[0], layers[14]):
        place = layer.weight.data_ptr()
        memories = [buffer.memory for buffer in pool.buffers]
        assert any(m.data_ptr() <= place < m.data_ptr() + m.nbytes for m in memories)


@pytest.mark.parametrize("kind", ["nf4+double", "int8", "dense"])
def test_its_bytes_are_counted_once(kind: str, deep_base) -> None:
    model = load(deep_base("llama"), kind)
    plain = static_categories(get_lift_model(load(deep_base("llama"), kind), progress=False))
    pool = stream_base(model, CPU)
    model = get_lift_model(model, progress=False)
    found = static_categories(model)
    places = [place for block in pool.blocks for place in block.places]
    streamed = sum(place.tensor.nbytes for place in places)
    wanted = plain["base weights"] - streamed + pool.nbytes + pool.host_nbytes
    assert found == {**plain, "base weights": wanted}


def test_blocks_are_those_of_the_model_each_once(deep_base) -> None:
    model = load(deep_base("llama"))
    blocks = layers_by_block(model)
    assert [len(block) for block in blocks] == [7] * 4
    again = layers_by_block(get_lift_model(model, progress=False))
    assert [[layer.base for layer in block] for block in again] == blocks


def test_blocks_that_cannot_be_found_are_refused(deep_base) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(4, 4)

        def get_input_embeddings(self) -> None:
            return None

    with pytest.raises(UserError, match=r"blocks of this Plain cannot be found.*stream_base"):
        stream_base(Plain(), CPU)


def test_memory_that_cannot_be_pinned_is_said(deep_base, monkeypatch: pytest.MonkeyPatch) -> None:
    def none_left(*args: Any, **options: Any) -> Any:
        raise RuntimeError("CUDA error: out of memory")

    model = load(deep_base("llama"))
    monkeypatch.setattr("leanlift.streaming.block.torch.empty", none_left)
    with pytest.raises(UserError, match=r"memory of the host's, pinned, and .* could not be had"):
        stream_base(model, CPU)
