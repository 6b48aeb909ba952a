"""One walk puts layers into every model: a plan has those of what attaches, and what is put in
comes out again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from sweeps import swept
from tiny import FORMATS, load, make_checkpoint, make_checkpoint_of, quantization
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from leanlift import (
    LiftConfig,
    PlanSettings,
    UserError,
    get_lift_model,
    load_adapter,
    quantize_experts,
    save_adapter,
    unload_adapter,
)
from leanlift.layers import FrozenLinear, Workspace
from leanlift.model import embedding_to_cpu, freeze_quantized, lift_layers
from leanlift.model.surgery import layers_over, outer_modules, replace_modules
from leanlift.plan.fake import attach_fake, fake_tensors
from leanlift.weights.bnb import EmptyLinear
from leanlift.weights.quantized import (
    Weight4bit,
    Weight8bit,
    frozen_weight,
    is_quantized,
)

WAYS: dict[str, dict[str, Any]] = {
    "all": {"density": 0.05},
    "attention, int8 ends": {"target_modules": "attention", "quantize_embeddings": True},
    "bf16 values": {"rank_budget": 1, "values_dtype": "bfloat16"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        name: make_checkpoint_of(config_of(name), tmp_path_factory.mktemp("model"))
        for name in FAMILIES
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base"))


def looks(model: nn.Module) -> dict[str, Any]:
    """What every module of a model is, inside layers of ours too, and every tensor of theirs. What
    holds packed numbers is another module in a plan, and counts as one of that shape and format."""
    return {name: _held(module) or _looks(module) for name, module in model.named_modules()}


def _held(module: nn.Module) -> tuple[Any, ...] | None:
    if isinstance(module, EmptyLinear):
        kind: Any = Weight8bit if module.weight.quant_state is None else Weight4bit
        weight = kind(module)
    elif is_quantized(module):
        weight = frozen_weight(module)
    else:
        return None
    return "packed", weight.shape, weight.format, module.bias is None


def _looks(module: nn.Module) -> tuple[Any, ...]:
    return (
        f"{type(module).__module__}.{type(module).__qualname__}",
        module.extra_repr() if isinstance(module, FrozenLinear) else None,
        _hung_on(module),
        {key: _look(p) for key, p in module.named_parameters(recurse=False)},
        {key: _look(b) for key, b in module.named_buffers(recurse=False)},
    )


def _hung_on(module: nn.Module) -> str | None:
    """The function that stands for a module's own forward, if any does."""
    forward = vars(module).get("forward")
    return None if forward is None else forward.func.__qualname__


def _look(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.dtype, tensor.requires_grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", swept(FORMATS, "nf4+double"))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_has_the_modules_of_what_attaches(
    checkpoints: dict[str, Path], family: str, kind: str, way: str
) -> None:
    config = LiftConfig.from_dict({"selector": "magnitude", **WAYS[way]})
    real = AutoModelForCausalLM.from_pretrained(
        checkpoints[family], quantization_config=quantization(kind), dtype=torch.float32
    )
    get_lift_model(quantize_experts(real), config, progress=False)
    on_cpu = config.quantize_embeddings and not any(
        word in family for word in ("tied", "turned", "gemma")
    )
    if on_cpu:
        embedding_to_cpu(real)
    attached = looks(real.eval())
    with fake_tensors():
        planned = AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
        fmt = PlanSettings(cuda=False, **FORMATS[kind]).requested_format
        attach_fake(planned, config, fmt, embedding_on_cpu=on_cpu)
        assert looks(planned.eval()) == attached


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_replaced_can_be_put_back(base: Path, kind: str) -> None:
    model = load(base, kind)
    before = dict(model.named_modules())
    weights = {name: frozen_weight(module, name) for name, module in before.items()
               if name.endswith("_proj")}  # fmt: skip
    replaced = replace_modules(model, layers_over(weights, {}, Workspace()))
    assert list(replaced) == list(weights)
    assert all(replaced[name] is before[name] for name in replaced)
    assert not any(name.endswith(".base") for name, _ in outer_modules(model))
    assert not replace_modules(model, layers_over(weights, {}, Workspace()))  # they are there
    replace_modules(model, lambda name, _: replaced.get(name))
    assert {name: id(m) for name, m in model.named_modules()} == {
        name: id(m) for name, m in before.items()
    }


def test_layers_keep_the_mode_of_what_they_replace(base: Path) -> None:
    model = load(base)
    model.train()
    model.model.layers[1].eval()
    freeze_quantized(model)
    for name, module in model.named_modules():
        if isinstance(module, FrozenLinear):
            assert module.training == module.base.training == ("layers.0" in name)


def test_a_frozen_model_has_our_forward_where_it_is_quantized(base: Path) -> None:
    model = load(base, "int8")
    stock = {name for name, module in model.named_modules() if is_quantized(module)}
    freeze_quantized(model)
    ours = {n for n, module in model.named_modules() if type(module) is FrozenLinear}
    assert ours == stock
    dense = load(base, "dense")
    freeze_quantized(dense)
    assert not any(isinstance(module, FrozenLinear) for module in dense.modules())


def test_every_weight_is_wrapped_once_and_a_base_fingerprinted_once(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from leanlift.model import base as room

    calls: list[str] = []

    def counting(name: str) -> None:
        original = getattr(room, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            calls.append(args[1] if name == "target_weight" else name)
            return original(*args, **kwargs)

        monkeypatch.setattr(room, name, counted)

    counting("target_weight")
    counting("fingerprint")
    counts: list[str] = []
    count = LiftConfig.count
    monkeypatch.setattr(LiftConfig, "count", lambda *args: counts.append(args[2]) or count(*args))
    model = get_lift_model(load(base), LiftConfig(approx_rank=8), progress=False)
    expected = sorted([*lift_layers(model),
                       "fingerprint"])  # fmt: skip
    assert sorted(calls) == expected
    assert sorted([*counts, "fingerprint"]) == expected
    save_adapter(model, tmp_path / "adapter")
    calls.clear()
    load_adapter(load(base), tmp_path / "adapter")
    assert sorted(calls) == expected
    calls.clear()
    load_adapter(unload_adapter(model), tmp_path / "adapter")
    assert calls == []  # what is wrapped already is known


def test_nothing_is_changed_where_a_weight_cannot_be_read(base: Path) -> None:
    model = load(base)
    model.model.layers[1].mlp.up_proj.weight.quant_state = None
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj"):
        get_lift_model(model, LiftConfig(approx_rank=8), progress=False)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_nothing_is_replaced_where_one_layer_cannot_be_made(base: Path) -> None:
    model = load(base)
    before = {name: id(module) for name, module in model.named_modules()}

    def make(name: str, module: nn.Module) -> nn.Module | None:
        if "layers.1" in name:
            raise ValueError("no such layer")
        return nn.Identity() if name.endswith("up_proj") else None

    with pytest.raises(ValueError, match="no such layer"):
        replace_modules(model, make)
    assert {name: id(module) for name, module in model.named_modules()} == before


def test_one_layer_stands_wherever_a_weight_is_used_again() -> None:
    """Blocks that a model goes through several times: one set of offsets, gradients summed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=3, vocab_size=50,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    first, last = model.model.layers[0].mlp, model.model.layers[2].mlp
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(last, name).weight = getattr(first, name).weight
    twin = copy.deepcopy(model)
    ids = torch.arange(3, 20)[None]
    lift = LiftConfig(density=0.2, selector="random", target_modules=("up_proj",))
    get_lift_model(model, lift, progress=False)
    layers = lift_layers(model)
    assert sorted(layers) == [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    assert model.model.layers[2].mlp.up_proj is layers["model.layers.0.mlp.up_proj"]
    for each in (model, twin):
        each.eval()(input_ids=ids, labels=ids).loss.backward()
    for name, layer in layers.items():
        dense = twin.get_submodule(name).weight.grad.reshape(-1)[layer.index.to_flat()]
        assert torch.allclose(layer.values.grad, dense, atol=1e-6)


def test_modules_keep_their_order(base: Path) -> None:
    """A sequence computes in the order of its modules."""
    model = load(base, "dense")
    model.config._name_or_path = "made here"
    for block in model.model.layers:
        mlp = block.mlp
        mlp.inner = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 64))
        mlp.forward = mlp.inner.forward
    model.eval().requires_grad_(False)
    ids = torch.arange(9)[None]
    expected, names = model(ids).logits, [name for name, _ in model.named_modules()]
    config = LiftConfig(selector="magnitude", target_modules=("inner.0", "inner.2", "q_proj"))
    get_lift_model(model, config, progress=False)
    kept = [name for name, _ in model.named_modules() if name in names]
    assert kept == names
    assert torch.equal(model(ids).logits, expected)
    unload_adapter(model)
    assert [name for name, _ in model.named_modules() if name in names] == names
    assert torch.equal(model(ids).logits, expected)
