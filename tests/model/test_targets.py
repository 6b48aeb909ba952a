"""Which Linears are trained, what is left of the blocks, and when too much would be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import make_linear4bit, make_linear8bit
from tiny import load
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Mamba2Config,
    MambaConfig,
    MambaForCausalLM,
    OPTConfig,
    Qwen3MoeConfig,
)

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.model import lift_layers, lifted
from leanlift.model.blocks import inside_blocks
from leanlift.model.presets import in_preset
from leanlift.weights.kinds import is_plain_linear
from leanlift.weights.quantized import frozen_weight


class OtherLinear(nn.Linear):
    """As FP8 and QAT libraries have them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.weight.round(decimals=1), self.bias)


class PackedLinear(nn.Module):
    """As GPTQ's."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(8, 64, dtype=torch.int32))


class Matrix(nn.Module):
    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))


class Experts(Matrix):
    """As transformers holds those of a mixture."""


STRANGE: dict[str, tuple[Callable[[int], nn.Module], str, str]] = {
    "subclass": (
        lambda rows: OtherLinear(64, rows),
        "is a OtherLinear, a Linear of a kind",
        "up_proj (OtherLinear)",
    ),
    "matrix": (
        lambda rows: Matrix(rows, 64),
        r"holds a matrix \(\d+, 64\) of its own",
        "up_proj (Matrix)",
    ),
    "experts": (
        lambda rows: Experts(8, rows // 8, 64),
        r"holds fused expert weights \(8, \d+, 64\)",
        "up_proj (Experts)",
    ),
    "convolution": (
        lambda rows: nn.Conv1d(64, rows, 1),
        "is a convolution with weights",
        "up_proj (Conv1d)",
    ),
}


NAME = r"model\.layers\.1\.mlp\.up_proj"


@pytest.mark.parametrize("case", STRANGE)
def test_blocks_whose_weights_are_mostly_not_read_are_refused(base: Path, case: str) -> None:
    build, match, _ = STRANGE[case]
    model = load(base, "dense")
    model.model.layers[1].mlp.up_proj = build(4096)
    with pytest.raises(UserError, match=rf"only \d+% .* {NAME} {match}.*target_modules"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert not lift_layers(model)
    named = LiftConfig(approx_rank=8, target_modules="attention")
    assert len(lift_layers(get_lift_model(model, named, progress=False))) == 8


@pytest.mark.parametrize("case", STRANGE)
def test_what_is_left_of_the_blocks_is_said(
    base: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, _, kind = STRANGE[case]
    model = load(base, "dense")
    model.model.layers[1].mlp.extra = build(64)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert (
        "%  trained  q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in caplog.text
    )
    assert f"%  frozen   {kind.replace('up_proj', 'extra')} " in caplog.text


def test_what_is_packed_is_refused(base: Path) -> None:
    model = load(base, "dense")
    model.model.layers[1].mlp.up_proj = PackedLinear()
    with pytest.raises(UserError, match=f"{NAME} is a PackedLinear with packed weights"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_a_linear_whose_weight_others_read_is_left_frozen_and_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The scan of Mamba takes the weights of three of its four Linears past their modules."""
    config = MambaConfig(hidden_size=64, num_hidden_layers=1, vocab_size=50, state_size=4)
    model = MambaForCausalLM(config)
    get_lift_model(model, LiftConfig(approx_rank=8, density=0.2), progress=False)
    trained = {name.rpartition(".")[2] for name in lift_layers(model)}
    assert "in_proj" in trained
    assert "dt_proj" not in trained
    assert "dt_proj (Linear)" in caplog.text
    assert "conv1d (Conv1d)" in caplog.text
    model(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss.backward()
    for layer in lift_layers(model).values():
        assert layer.values.grad is not None
    with pytest.raises(UserError, match=r"dt_proj is read by MambaMixer itself"):
        get_lift_model(MambaForCausalLM(config), LiftConfig(target_modules=("dt_proj",)))


EXCLUDED: dict[str, tuple[str | tuple[str, ...], set[str]]] = {
    "a name": ("o_proj", {"o_proj"}),
    "names": (("q_proj", "mlp.down_proj"), {"q_proj", "down_proj"}),
    "a part of one block": (("1.self_attn.q_proj",), set()),
    "all in a block": (("layers.1",), set()),
    "all in a part": (("mlp", "1.self_attn"), {"gate_proj", "up_proj", "down_proj"}),
    "none": ((), set()),
}


@pytest.mark.parametrize("wanted", ["all-linear", "attention", ("o_proj", "q_proj", "k_proj")])
@pytest.mark.parametrize("case", EXCLUDED)
def test_what_is_excluded_is_not_trained_and_not_spoken_of(
    base: Path, caplog: pytest.LogCaptureFixture, case: str, wanted: str | tuple[str, ...]
) -> None:
    excluded, gone = EXCLUDED[case]
    config = LiftConfig(selector="random", target_modules=wanted)
    whole = set(lift_layers(get_lift_model(load(base, "dense"), config, progress=False)))
    config = LiftConfig(selector="random", target_modules=wanted, exclude_modules=excluded)
    found = set(lift_layers(get_lift_model(load(base, "dense"), config, progress=False)))
    ends = (excluded,) if isinstance(excluded, str) else excluded
    expected = {name for name in whole if not any(f".{end}." in f".{name}." for end in ends)}
    assert found == expected
    assert not gone & {name.rpartition(".")[2] for name in found}
    assert "frozen" not in caplog.text


def test_what_is_excluded_must_be_there(base: Path) -> None:
    config = LiftConfig(exclude_modules=("q_proj", "q_porj"))
    with pytest.raises(UserError, match=r"exclude_modules=\['q_porj'\] matches nothing"):
        get_lift_model(load(base, "dense"), config, progress=False)
    config = LiftConfig(target_modules=("q_proj",), exclude_modules="q_proj")
    with pytest.raises(UserError, match="leaves nothing of target_modules"):
        get_lift_model(load(base, "dense"), config, progress=False)


TOO_SMALL: dict[str, tuple[LiftConfig, int]] = {
    "of which the density selects nothing": (LiftConfig(density=0.001, selector="random"), 3),
    "of which the rank budget selects too much": (LiftConfig(rank_budget=8, selector="random"), 3),
}


@pytest.mark.parametrize("case", TOO_SMALL)
def test_a_preset_passes_over_a_matrix_and_says_so(
    base: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    config, rows = TOO_SMALL[case]
    model = load(base, "dense")
    model.model.layers[1].mlp.small = nn.Linear(64, rows)
    get_lift_model(model, config, progress=False)
    assert "model.layers.1.mlp.small" not in lift_layers(model)
    assert "frozen   small (Linear) is too small for the budget" in caplog.text
    assert len(lift_layers(model)) == 14
    named = replace(config, target_modules=("small",))
    model = load(base, "dense")
    model.model.layers[1].mlp.small = nn.Linear(64, rows)
    with pytest.raises(UserError, match=r"selects \d+ entries of model.layers.1.mlp.small"):
        get_lift_model(model, named, progress=False)


PARTS: dict[str, tuple[Any, dict[str, set[str]]]] = {
    "opt: no part has a name": (
        OPTConfig(hidden_size=64, word_embed_proj_dim=64, ffn_dim=64, num_hidden_layers=1,
                  num_attention_heads=4, vocab_size=50),
        {"attention": {"k_proj", "v_proj", "q_proj", "out_proj"}, "mlp": {"fc1", "fc2"}},
    ),
    "mamba2: a scan mixes tokens": (
        Mamba2Config(hidden_size=64, num_hidden_layers=1, num_heads=8, head_dim=16, vocab_size=50),
        {"attention": {"in_proj", "out_proj"}, "mlp": set()},
    ),
    "bert: outputs of both": (
        BertConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
                   intermediate_size=96, is_decoder=True),
        {"attention": {"query", "key", "value", "dense"}, "mlp": {"dense"}},
    ),
    "qwen3_moe: a family with a part in its name": (
        Qwen3MoeConfig(hidden_size=64, num_hidden_layers=1, num_attention_heads=4, vocab_size=50,
                       mlp_only_layers=[0], intermediate_size=96),
        {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
         "mlp": {"gate_proj", "up_proj", "down_proj"}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", PARTS)
def test_a_preset_finds_its_part_under_any_name(case: str) -> None:
    config, parts = PARTS[case]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = dict(model.named_modules())
    inside = [name for name in inside_blocks(names) if isinstance(names[name], nn.Linear)]
    found = {p: [n for n in inside if in_preset(names, n, p)] for p in ("attention", "mlp")}
    assert {p: {n.rpartition(".")[2] for n in all_} for p, all_ in found.items()} == parts
    assert sorted(found["attention"] + found["mlp"]) == sorted(inside)


class Written(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x @ self.weight.T
        return out if self.bias is None else out + self.bias


class Scaled(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 1.01


class WithoutBias(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight.T


class MadeOtherwise(nn.Linear):
    def __init__(self, config: object) -> None:
        super().__init__(4, 4)


KINDS: dict[type[nn.Linear], bool] = {
    nn.Linear: True, Written: True, OtherLinear: False, Scaled: False, WithoutBias: False,
    MadeOtherwise: False,
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_of_linears_is_one_if_it_computes_as_one(kind: Any) -> None:
    one = kind(None) if kind is MadeOtherwise else kind(4, 4)
    assert is_plain_linear(one) == KINDS[kind]


def test_such_a_class_is_trained_and_replaced(base: Path) -> None:
    model = load(base, "dense")
    before = model.model.layers[1].mlp.up_proj
    model.model.layers[1].mlp.up_proj = after = Written(64, 192, bias=False)
    after.weight = before.weight
    ids = torch.arange(3, 12)[None]
    wanted = model(input_ids=ids).logits
    get_lift_model(model, LiftConfig(selector="random"), progress=False)
    assert "model.layers.1.mlp.up_proj" in lift_layers(model)
    assert torch.allclose(model(input_ids=ids).logits, wanted, atol=1e-5)


class Reading(nn.Module):
    """Computes with the weight of a Linear in it past the Linear, and by its dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 64)
        self.other = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight.data.clamp_(-100, 100)
        return x @ self.inner.weight + self.other(x.to(self.other.weight.dtype))


@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
def test_who_reads_a_weight_gets_its_numbers_and_their_dtype(base: Path, kind: str) -> None:
    model = load(base, kind)
    torch.manual_seed(0)
    reading = Reading()
    if kind != "dense":
        make = make_linear4bit if kind == "nf4" else make_linear8bit
        reading.inner, reading.other = make(64, 64), make(64, 64)
    model.model.layers[0].reading = reading
    model.config._name_or_path = ""  # its checkpoint has no such part
    frozen = {name: frozen_weight(getattr(reading, name)) for name in ("inner", "other")}
    inner, other = (weight.rows(0, 64).float() for weight in frozen.values())
    bias = reading.other.bias
    get_lift_model(model, LiftConfig(selector="random"), progress=False)
    assert "model.layers.0.reading.inner" not in lift_layers(model)
    assert "model.layers.0.reading.other" in lift_layers(model)
    x = torch.randn(3, 64)
    wanted = x @ inner + nn.functional.linear(x, other, bias)
    assert torch.allclose(model.model.layers[0].reading(x), wanted, atol=1e-4)


def test_a_packed_weight_stands_for_no_numbers(base: Path) -> None:
    model = get_lift_model(load(base, "nf4"), LiftConfig(selector="random"), progress=False)
    weight = lifted(model).model.layers[0].mlp.up_proj.weight
    assert (weight.shape, weight.dtype) == ((192, 64), torch.float32)
    assert bool(weight.isnan().all())
