"""Experts that are quantized while they are read: the same bits, and never a stack in 16 bits."""

from __future__ import annotations

import inspect
import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from mixtures import EXPERTS, MIXTURES, make_mixture
from safetensors.torch import load_file, save_file
from sweeps import swept
from tiny import FORMATS, load, quantization
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PreTrainedModel

from leanlift import UserError, load_in_few_bits, quantize_experts
from leanlift.fingerprint import Layout
from leanlift.layers import FrozenExperts
from leanlift.measure import LiveBytes
from leanlift.source import loading_nbytes
from leanlift.training import RunArguments
from leanlift.training.base import load_model
from leanlift.weights.places import weight_tensors
from leanlift.weights.stacks import quantizing_nbytes

FILE = "model.safetensors"
QUANTIZED = [kind for kind in FORMATS if kind != "dense"]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints by family, each made when it is asked for; not to be changed."""
    place = tmp_path_factory.mktemp("mixtures")

    class Made(dict[str, Path]):
        def __missing__(self, family: str) -> Path:
            self[family] = make_mixture(MIXTURES[family], place / family)
            return self[family]

    return Made()


def experts(model: Any) -> dict[str, FrozenExperts]:
    return {n: m for n, m in model.named_modules() if isinstance(m, FrozenExperts)}


def tensors(layer: FrozenExperts) -> list[torch.Tensor]:
    return weight_tensors(layer.base)


def read(base: Path, kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    return load_in_few_bits(
        AutoModelForCausalLM, base, quantization_config=quantization(kind, dtype), dtype=dtype,
        **settings,
    )  # fmt: skip


def assert_same(one: Any, other: Any) -> None:
    """Two models with the same experts, bit by bit, and the same way back to the checkpoint."""
    mine, theirs = experts(one), experts(other)
    assert list(mine) == list(theirs)
    for name, layer in mine.items():
        assert (layer.shape, layer.dtype) == (theirs[name].shape, theirs[name].dtype)
        for a, b in zip(tensors(layer), tensors(theirs[name]), strict=True):
            assert torch.equal(a, b), name
    assert list(map(str, one._weight_conversions)) == list(map(str, other._weight_conversions))


@pytest.mark.parametrize(
    ("family", "kind", "dtype"),
    swept(
        product(MIXTURES, QUANTIZED, [torch.float32, torch.bfloat16]),
        ("qwen3_moe", "nf4+double", torch.bfloat16),
        ("gpt_oss", "int8", torch.float32),
    ),
)
def test_experts_are_the_bits_that_quantizing_a_loaded_model_makes(
    bases: dict[str, Path], family: str, kind: str, dtype: torch.dtype
) -> None:
    model, found = read(bases[family], kind, dtype, output_loading_info=True)
    assert not any(found.values())
    assert len(experts(model)) == 2 * 2
    assert_same(model, quantize_experts(load(bases[family], kind, dtype)))


@pytest.mark.parametrize(
    ("family", "kind"), swept(product(MIXTURES, ["nf4", "int8"]), ("qwen3_moe", "nf4"))
)
def test_no_stack_is_ever_there_in_16_bits(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, family: str, kind: str
) -> None:
    monkeypatch.setattr("leanlift.weights.bnb.linear.QUANTIZED_AT_ONCE", 64 * 64)
    stack = min(m.shape.numel() for m in experts(read(bases[family], kind)).values())
    with Floats() as largest:
        read(bases[family], kind, torch.bfloat16)
    assert largest.numel < stack / EXPERTS * 3 < stack
    with Floats() as largest:
        quantize_experts(load(bases[family], kind, torch.bfloat16))
    assert largest.numel >= stack


class Floats(TorchDispatchMode):
    """Records how many floating-point numbers the largest tensor has that any operation makes;
    those of a file are mapped."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = isinstance(out, torch.Tensor) and not (func.is_view or out.is_meta)
        if made and out.is_floating_point():
            self.numel = max(self.numel, out.numel())
        return out


@pytest.mark.parametrize("kind", swept(QUANTIZED, "nf4+double"))
def test_the_peak_of_loading_is_within_the_rule(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    for place in ("leanlift.weights.stacks", "leanlift.weights.bnb.linear"):
        monkeypatch.setattr(f"{place}.QUANTIZED_AT_ONCE", 64 * 64)
    read(bases["qwen3_moe"], kind)  # what is made once
    with LiveBytes() as live:
        model = read(bases["qwen3_moe"], kind)
    weights = [layer.weight_tiles for layer in experts(model).values()]
    by_tiles = max(quantizing_nbytes(w.shape, w.format) for w in weights)  # type: ignore[attr-defined]
    rule = loading_nbytes(live.current, model.lm_head.weight.nbytes, by_tiles)
    assert live.peak <= rule < live.current + max(4 * w.shape[0] * w.shape[1] for w in weights)


def test_where_the_place_of_experts_is_not_known_they_are_quantized_afterwards(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("leanlift.training.experts.layout_of", lambda *_: Layout())
    with caplog.at_level(logging.WARNING, logger="leanlift"):
        model = read(bases["qwen3_moe"], "nf4")
    assert "4 stacks of experts" in caplog.text
    assert_same(model, quantize_experts(load(bases["qwen3_moe"], "nf4")))


def test_nothing_is_quantized_where_nothing_was_asked_to_be(bases: dict[str, Path]) -> None:
    assert not experts(read(bases["mixtral"], "dense"))


def test_the_private_function_that_loads_is_still_what_is_replaced() -> None:
    parameters = list(inspect.signature(PreTrainedModel._load_pretrained_model).parameters)
    assert parameters[:4] == ["model", "state_dict", "checkpoint_files", "load_config"], (
        "transformers' _load_pretrained_model has changed: look at leanlift/training/experts.py, "
        "which was written for the former one"
    )


def test_loading_is_as_it_was_afterwards_also_where_it_fails(tmp_path: Path) -> None:
    before = PreTrainedModel._load_pretrained_model
    with pytest.raises((OSError, ValueError)):
        read(tmp_path, "nf4")
    assert PreTrainedModel._load_pretrained_model is before


def damage(place: Path, name: str, what: str) -> None:
    found = load_file(place / FILE)
    key = next(key for key in found if key.endswith(name))
    tensor = found.pop(key)
    if what == "one more":
        found |= {key: tensor, key.replace("layers.1", "layers.2"): tensor.clone()}
    if what == "another shape":
        found[key] = tensor[..., :-2].clone()
    save_file(found, place / FILE, {"format": "pt"})


DAMAGED = {
    "lacking": "was not read whole: it lacks|cannot be loaded",
    "one more": "holds what its architecture has no place for",
    "another shape": "has other shapes than|cannot be loaded",
}
"""What is done to a tensor, and what is said: stock transformers cannot join experts of which one
is not there or has another shape, and says so itself."""


@pytest.mark.parametrize("what", DAMAGED)
@pytest.mark.parametrize(
    ("family", "name"),
    swept(
        [
            ("qwen3_moe", "layers.1.mlp.experts.3.up_proj.weight"),
            ("gpt_oss", "layers.1.mlp.experts.down_proj"),
            ("granitemoe", "layers.1.block_sparse_moe.input_linear.weight"),
        ],
        ("qwen3_moe", "layers.1.mlp.experts.3.up_proj.weight"),
    ),
)
def test_experts_that_are_not_whole_are_refused(
    tmp_path: Path, family: str, name: str, what: str
) -> None:
    base = make_mixture(MIXTURES[family], tmp_path / "base")
    damage(base, name, what)
    args = RunArguments(model_name_or_path=str(base), dataset_name="", dtype="float32")
    with pytest.raises(UserError, match=DAMAGED[what]):
        load_model(args, torch.device("cpu"))
