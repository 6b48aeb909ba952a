"""MLPs in pieces: the plain step within rounding, no tensor of the whole length inside, and no
products more than a checkpointed step has."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from families import FAMILIES, SIZES, config_of
from helpers import LargestTensor, effective_oracle, relative_error
from sweeps import swept
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PhiConfig, Starcoder2Config

from leanlift import LiftConfig, get_lift_model
from leanlift.layers import FrozenLinear, LiftLinear
from leanlift.layers.fused_glu import use_stock_glu
from leanlift.layers.tiled_mlp import pieces
from leanlift.model import claim, lift_layers, lift_state, lifted, tiled_mlp

OTHERS: dict[str, Any] = {
    "gpt-neox": GPTNeoXConfig(**SIZES),
    "phi": PhiConfig(**SIZES),
    "starcoder2": Starcoder2Config(**SIZES, residual_dropout=0.0),
}
ALL = [name for name in FAMILIES if "experts" not in name] + list(OTHERS)
TOKENS = 150
IDS = torch.randint(3, 60, (3, 50), generator=torch.Generator().manual_seed(1))

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 16)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 32)
    monkeypatch.setattr("leanlift.layers.tiled_norms.PIECE_BYTES", 4096)


def attached(family: str = "llama", dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model with offsets that are not zero."""
    torch.manual_seed(0)
    config = copy.deepcopy(OTHERS[family]) if family in OTHERS else config_of(family)
    config.attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    told = {"selector": "magnitude", "density": 0.1, **more}
    model = get_lift_model(model, LiftConfig(**told), progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    claim(lifted(model))
    return model.train()


def mlp_of(model: Any) -> Any:
    """The first MLP that goes in pieces."""
    return lifted(model).get_submodule(tiled_mlp(model)[0])


def passed(mlp: Any, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    """y, the gradient of x, and those of all that trains."""
    x, trained = x.clone().requires_grad_(), [p for p in mlp.parameters() if p.requires_grad]
    y = mlp(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *trained], grad_y)]


def truth_of(mlp: Any) -> tuple[Any, list[Tensor]]:
    """The MLP in fp64 with plain Linears, and which entries of their weights train."""
    exact, entries = copy.deepcopy(mlp), []
    use_stock_glu(exact)
    for name, layer in list(exact.named_modules()):
        if isinstance(layer, LiftLinear):
            linear = nn.Linear(1, 1, bias=layer.bias is not None)
            linear.weight = nn.Parameter(effective_oracle(layer).double())
            if layer.bias is not None:
                linear.bias = nn.Parameter(layer.bias.double(), requires_grad=False)
            exact.set_submodule(name, linear)
            entries.append(layer.index.to_flat())
    return exact, entries


@pytest.mark.parametrize("family", swept(ALL, "llama", "phi3, fused", "gpt2, turned", "starcoder2"))
def test_outputs_and_gradients_are_as_good_as_the_plain_ones(family: str) -> None:
    """Against fp64: the error is at most twice that of the whole, and below 1e-6. Products of fewer
    rows may be summed in another order, and the values' gradients are sums over pieces."""
    mlp = mlp_of(attached(family))
    exact, entries = truth_of(mlp)
    x, grad_y = torch.randn(3, 50, 64), torch.randn(3, 50, 64)
    truth = passed(exact, x.double(), grad_y.double())
    truth[2:] = [g.view(-1)[flat] for g, flat in zip(truth[2:], entries, strict=True)]
    ours = passed(mlp, x, grad_y)
    use_stock_glu(mlp)
    plain = passed(mlp, x, grad_y)
    for got, whole, wanted in zip(ours, plain, truth, strict=True):
        error = relative_error(got, wanted)
        assert error <= min(1e-6, 2 * relative_error(whole, wanted) + 1e-8)
        assert got.shape == whole.shape


def step(model: Any, checkpointing: bool, autocast: bool = False, times: int = 1) -> dict[str, Any]:
    """The loss of a step, its gradients, and how often each came."""
    model = lifted(model)
    model.zero_grad()
    model.gradient_checkpointing_disable()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    seen: Counter[int] = Counter()
    layers = lift_layers(model)
    hooks = [
        layer.values.register_post_accumulate_grad_hook(lambda p: seen.update([id(p)]))
        for layer in layers.values()
    ]
    for _ in range(times):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    assert set(seen.values()) == {times}
    return {"loss": loss.detach(), **{n: layer.values.grad for n, layer in layers.items()}}


def assert_alike(ours: dict[str, Any], plain: dict[str, Any], within: float) -> None:
    for name, wanted in plain.items():
        assert relative_error(ours[name], wanted.double()) <= within, name
        assert ours[name].dtype == wanted.dtype


SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "plain": ({}, {}, 1e-6),
    "accumulated": ({}, {"times": 2}, 1e-6),
    "bf16 offsets": ({"values_dtype": "bfloat16"}, {}, 2**-7),
    "autocast": ({}, {"autocast": True}, 2**-6),
    "bf16": ({"dtype": torch.bfloat16}, {}, 2**-6),
    "some Linears": ({"target_modules": ("q_proj", "up_proj")}, {}, 1e-6),
    "the last alone": ({"target_modules": ("down_proj",)}, {}, 1e-6),
    "none of them": ({"target_modules": ("q_proj",)}, {}, 1e-6),
    "all entries": ({"density": 1.0}, {}, 1e-6),
}


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("setting", swept(list(SETTINGS), "plain", "bf16 offsets", "some Linears"))
def test_a_step_is_the_plain_one(setting: str, checkpointing: bool) -> None:
    attaching, stepping, within = SETTINGS[setting]
    model = attached(**attaching)
    plain = step(model, checkpointing, **stepping)
    plain = {name: tensor.clone() for name, tensor in plain.items()}
    assert len(tiled_mlp(model)) == 2
    assert_alike(step(model, checkpointing, **stepping), plain, within)


@pytest.mark.parametrize(("tokens", "wanted"), [(20, [19] * 7 + [17]), (100, [75, 75])])
def test_pieces_may_be_smaller_or_larger(tokens: int, wanted: list[int]) -> None:
    assert [stop - start for start, stop in pieces(TOKENS, tokens)] == wanted
    model = attached()
    plain = {name: tensor.clone() for name, tensor in step(model, False).items()}
    tiled_mlp(model, tokens)
    assert_alike(step(model, False), plain, 1e-6)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Rows that were multiplied, by product; and weights that were made."""
    seen: Counter[str] = Counter()

    def watch(kind: Any, name: str, rows: Any) -> None:
        own = getattr(kind, name)

        def counting(self: Any, *args: Any) -> Any:
            seen[name] += rows(*args)
            return own(self, *args)

        monkeypatch.setattr(kind, name, counting)

    for name in ("product", "product_back"):
        watch(FrozenLinear, name, lambda x, weight=None: x.shape[:-1].numel())
    watch(LiftLinear, "values_gradient", lambda x, grad_y: x.shape[0])
    watch(LiftLinear, "effective_rows", lambda *_: 1)
    return seen


@pytest.mark.parametrize("tokens", [None, 100])
def test_a_checkpointed_step_has_no_product_more_and_makes_weights_per_piece(
    tokens: int | None, counted: Counter[str]
) -> None:
    model = attached(target_modules=("gate_proj", "up_proj", "down_proj"))
    step(model, True)
    plain = dict(counted)
    counted.clear()
    tiled_mlp(model, tokens)
    step(model, True)
    for name in ("product", "product_back", "values_gradient"):
        assert counted[name] == plain[name], name
    assert counted["effective_rows"] == plain["effective_rows"] * len(pieces(TOKENS, tokens))


def test_without_recomputation_all_but_the_last_are_multiplied_with_once_more(
    counted: Counter[str],
) -> None:
    model = attached(target_modules=("gate_proj", "up_proj", "down_proj"))
    step(model, False)
    plain = dict(counted)
    counted.clear()
    tiled_mlp(model)
    step(model, False)
    assert counted["product"] == plain["product"] + 2 * 2 * TOKENS
    for name in ("product_back", "values_gradient"):
        assert counted[name] == plain[name], name


@pytest.mark.parametrize("family", swept(ALL, "llama", "phi3, fused"))
def test_nothing_inside_is_as_long_as_the_rows(family: str) -> None:
    mlp = mlp_of(attached(family, density=0.01))
    x = torch.randn(500, 64).requires_grad_()
    with LargestTensor([x, *mlp.parameters()]) as largest:
        mlp(x).sum().backward()
    assert largest.numel == 500 * 64, "what is as long is as narrow as the rows"


def test_what_observes_a_layer_sees_what_it_saw() -> None:
    model = attached()
    seen: list[dict[str, Tensor]] = []

    def observer(name: str) -> Any:
        def observe(x: Tensor, grad_y: Tensor, first: int = 0) -> None:
            sums[name] = sums.get(name, 0) + grad_y.T @ x

        return observe

    for _ in range(2):
        sums: dict[str, Tensor] = {}
        for name, layer in lift_layers(model).items():
            layer.observer = observer(name)
        lifted(model)(input_ids=IDS, labels=IDS).loss.backward()
        seen.append(sums)
        tiled_mlp(model)
    assert_alike(seen[1], seen[0], 1e-6)
    assert len(seen[1]) == 14


def test_a_change_between_the_passes_is_noticed() -> None:
    mlp = mlp_of(attached())
    y = mlp(torch.randn(3, 50, 64).requires_grad_())
    next(iter(mlp.parameters())).data.add_(1)
    for layer in mlp.modules():
        if isinstance(layer, LiftLinear):
            layer.values.data.zero_()
            torch._C._increment_version([layer.values])
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        y.sum().backward()


def test_without_the_adapter_scaled_and_merged() -> None:
    """What a backward pass computes with is what its forward pass had."""
    model = attached()
    mlp, space = mlp_of(model), lift_state(model).workspace
    x, grad_y = torch.randn(3, 50, 64), torch.randn(3, 50, 64)

    def all_ways() -> list[Tensor]:
        found = []
        leaf = x.clone().requires_grad_()
        with space.without_offsets():
            y = mlp(leaf)
        found += [y.detach(), *torch.autograd.grad(y, leaf, grad_y)]
        for layer in mlp.modules():
            if isinstance(layer, LiftLinear):
                layer.scale = 0.5
        found += passed(mlp, x, grad_y)
        for layer in mlp.modules():
            if isinstance(layer, LiftLinear):
                layer.merged = layer.effective_weight(torch.float32).clone()
        y = mlp(leaf)
        found += [y.detach(), *torch.autograd.grad(y, leaf, grad_y)]
        for layer in mlp.modules():
            if isinstance(layer, LiftLinear):
                layer.merged, layer.scale = None, 1.0
        return found

    ours = all_ways()
    use_stock_glu(mlp)
    for got, wanted in zip(ours, all_ways(), strict=True):
        assert relative_error(got, wanted.double()) <= 1e-6


def test_a_saved_tensor_s_hooks_see_the_input_alone() -> None:
    """So that offloading moves no piece to the host and back."""
    mlp, x, seen = mlp_of(attached()), torch.randn(3, 50, 64).requires_grad_(), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor.shape)
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mlp(x).sum().backward()
    assert seen == [x.shape]


# --- which --------------------------------------------------------------------------------------


def test_an_active_dropout_and_a_trained_bias_go_the_own_way() -> None:
    model = attached("gpt2, turned")
    mlp, x = mlp_of(model), torch.randn(3, 50, 64)
    mlp.dropout.p = 0.5
    torch.manual_seed(3)
    ours = mlp(x)
    torch.manual_seed(3)
    assert torch.equal(ours, type(mlp).forward(mlp, x))
    assert not torch.equal(ours, mlp.eval()(x))
    mlp.c_fc.base.bias.requires_grad_()
    mlp(x).sum().backward()
    assert mlp.c_fc.base.bias.grad is None or mlp.c_fc.base.bias.grad.any()


def test_short_rows_go_the_plain_way(monkeypatch: pytest.MonkeyPatch) -> None:
    mlp = mlp_of(attached())
    monkeypatch.setattr("leanlift.layers.tiled_mlp.KeepInput.apply", None)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.Compute.apply", None)
    for tokens in (1, 16):
        mlp(torch.randn(1, tokens, 64)).sum().backward()
    with pytest.raises(TypeError):
        mlp(torch.randn(1, 17, 64))


def test_a_merged_model_has_nothing_of_it() -> None:
    model = attached()
    tiled_mlp(model)
    merged = model.merge_and_unload()
    assert all("forward" not in vars(module) for module in merged.modules())


def test_a_copy_computes_with_its_own_layers() -> None:
    model = lifted(attached())
    tiled_mlp(model)
    again = copy.deepcopy(model)
    for layer in lift_layers(again).values():
        layer.values.data.zero_()
    ask = {"input_ids": IDS}
    assert not torch.equal(model(**ask).logits, again(**ask).logits)
