"""Norms that keep their input alone, and the Linears behind them nothing: the same bits."""

from __future__ import annotations

import copy
import io
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import FAMILIES, config_of
from helpers import saved_nbytes
from recomputing import RUNS, Run, gradients
from sweeps import swept
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, get_lift_model
from leanlift.layers import made_again
from leanlift.layers.autograd import KeepInput
from leanlift.layers.fused_glu import use_stock_glu
from leanlift.layers.kept_norms import use_kept_norms
from leanlift.layers.made_again import KeepSources, made_of
from leanlift.layers.tiled_norms import use_tiled_norms
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers, lifted

TOKENS, WIDTH = 40, 64


def attached(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """With norms that do something and offsets that are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family), dtype=dtype)
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.data.uniform_(0.5, 1.5)
    config = LiftConfig(selector="random", density=0.1)
    model = get_lift_model(model.requires_grad_(False), config, progress=False)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(0, 0.01)
    return model


def stock(model: Any) -> Any:
    """The same model, whose norms have their own forward again."""
    twin = copy.deepcopy(model)
    for part in twin.modules():
        if "Norm" in type(part).__name__:
            vars(part).pop("forward", None)
    return twin


def step(model: Any) -> dict[str, Tensor]:
    """The loss and every gradient."""
    model.train()
    model.zero_grad()
    torch.manual_seed(0)  # of dropouts
    ids = torch.arange(2 * TOKENS).view(2, TOKENS) % 60
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **found}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an input was kept by a Linear, sources were, and something was made again."""
    found: Counter[str] = Counter()

    def watch(owner: Any, name: str) -> None:
        own = getattr(owner, name)

        def counting(*args: Any) -> Any:
            found[f"{owner.__name__.rpartition('.')[2]}.{name}"] += 1
            return own(*args)

        monkeypatch.setattr(owner, name, counting)

    watch(KeepInput, "forward")
    watch(KeepSources, "forward")
    watch(made_again, "_made")
    return found


# --- the same numbers -------------------------------------------------------------------------


@pytest.mark.parametrize("recomputed", [False, True], ids=["", "recomputed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", swept(list(FAMILIES), "llama", "gemma2", "gpt2, turned"))
def test_a_step_has_the_same_numbers(family: str, dtype: torch.dtype, recomputed: bool) -> None:
    model = attached(family, dtype)
    other = stock(model)
    for each in (model, other):
        if recomputed:
            each.gradient_checkpointing_enable({"use_reentrant": False})
            each.enable_input_require_grads()
    found, wanted = step(model), step(other)
    assert found.keys() == wanted.keys()
    for name, one in found.items():
        if dtype == torch.bfloat16:
            assert torch.equal(one, wanted[name]), name
        else:  # what the residual stream gets is added in another order
            torch.testing.assert_close(one, wanted[name], rtol=1e-4, atol=1e-6)


class Block(nn.Module):
    """A norm, and Linears of ours that take what it gives."""

    def __init__(self) -> None:
        super().__init__()
        part = lifted(attached("llama")).model.layers[0]
        self.norm, attention = part.input_layernorm, part.self_attn
        self.linears = nn.ModuleList([attention.q_proj, attention.k_proj, attention.v_proj])

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return torch.cat([linear(y) for linear in self.linears], -1).square()


WAYS: dict[str, Run] = {
    **RUNS,
    "the norm is not recomputed": lambda block: (
        lambda x: checkpoint(
            lambda y: torch.cat([each(y) for each in block.linears], -1).square(),
            block.norm(x),
            use_reentrant=False,
        )
    ),
}


@pytest.mark.parametrize("offloaded", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("run", WAYS)
def test_a_block_has_the_same_numbers(run: str, autocast: bool, offloaded: bool) -> None:
    block, x, found = Block(), torch.randn(TOKENS, WIDTH), []
    for each in (stock(block), block):
        saving: Any = save_on_cpu() if offloaded else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saving:
            found.append(gradients(WAYS[run](each), each, x))
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        if "twice" in run:  # the gradient of x is added in another order
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(one, other)


def test_gradients_can_be_asked_for_in_parts_and_again() -> None:
    """Some of the values alone; then all, of a graph that was kept."""
    block = Block()
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    twin = stock(block)
    wanted = gradients(twin, twin, x.detach())[1:]
    leaves = [x, *(linear.values for linear in block.linears)]
    total = block(x).square().sum()
    for asked in ([1], [2], [3], [1], [1, 3], [0], [0, 1, 2, 3], [3, 0]):
        found = torch.autograd.grad(total, [leaves[i] for i in asked], retain_graph=True)
        for place, gradient in zip(asked, found, strict=True):
            assert torch.equal(gradient, wanted[place]), asked


def test_what_is_made_again_is_made_under_the_autocast_of_then() -> None:
    weight = torch.randn(8, 8)
    x = torch.randn(5, 8)
    found = []
    for make in (lambda x: made_of(weight.__rmatmul__, (x,)), weight.__rmatmul__):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = make(leaf)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        found.append(leaf.grad)
    assert torch.equal(*found)


@pytest.mark.parametrize("how", ["written to", "another one", "for one call", "narrower"])
def test_a_norm_that_changed_before_the_backward_pass_is_noticed(how: str) -> None:
    block, x = Block(), torch.randn(TOKENS, WIDTH, requires_grad=True)
    three = (3 * block.norm.weight).detach()
    if how == "for one call":
        y = torch.func.functional_call(block, {"norm.weight": three}, (x,))
    else:
        y = block(x)
    if how == "written to":
        with torch.no_grad():
            block.norm.weight.mul_(3)
    if how == "another one":
        block.norm.weight = nn.Parameter(three, requires_grad=False)
    if how == "narrower":
        block.norm.to(torch.bfloat16)
    with pytest.raises(RuntimeError, match="LlamaRMSNorm changed between its forward"):
        y.sum().backward()


def test_what_a_norm_gives_can_be_saved() -> None:
    y, file = Block().norm(torch.randn(TOKENS, WIDTH, requires_grad=True)), io.BytesIO()
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False), y)


# --- what is kept and made --------------------------------------------------------------------


def test_the_input_of_a_norm_alone_is_kept_once_made_again(counted: Counter[str]) -> None:
    block = Block()
    x = torch.randn(TOKENS, WIDTH)
    gradients(block, block, x)
    assert counted == {"KeepSources.forward": 1, "made_again._made": 1}


@pytest.mark.parametrize("offloaded", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("run", ["recomputed", "recomputed by another pass"])
def test_in_a_recomputed_block_a_norm_is_its_own(
    run: str, offloaded: bool, counted: Counter[str]
) -> None:
    block = Block()
    with save_on_cpu() if offloaded else nullcontext():
        gradients(RUNS[run](block), block, torch.randn(TOKENS, WIDTH))
    assert not counted["KeepSources.forward"]
    assert counted["KeepInput.forward"] > 0


def test_two_bytes_a_number_are_kept_of_six() -> None:
    torch.manual_seed(0)
    model = attached("llama", torch.bfloat16)
    block = lifted(model).model.layers[0]
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    angles = lifted(model).model.rotary_emb(x, torch.arange(TOKENS)[None])

    def run(x: Tensor) -> Any:
        return block(x, position_embeddings=angles)

    ours = saved_nbytes(run, x)
    use_stock_glu(block)  # the MLP's products are kept again too
    wide = TOKENS * config_of("llama").intermediate_size * 2
    other = saved_nbytes(run, x)
    assert other - ours >= 2 * (4 + 2 - 2) * x.numel() + wide


def test_a_long_row_peaks_no_higher() -> None:
    """The output is gone before the gradient of the input is made."""
    block = Block()
    x = torch.randn(4000, WIDTH, requires_grad=True)
    peaks = []
    for each in (block, stock(block)):
        for run in ("as it is", "recomputed"):
            with LiveBytes() as live:
                RUNS[run](each)(x).sum().backward()
            peaks.append(live.peak)
    assert peaks[0] <= peaks[2]
    assert peaks[1] <= peaks[3]


@pytest.mark.parametrize("case", ["trained", "no gradient of x", "evaluated", "called otherwise"])
def test_where_it_keeps_nothing_a_norm_is_its_own(case: str, counted: Counter[str]) -> None:
    block = Block()
    x = torch.randn(TOKENS, WIDTH, requires_grad=case != "no gradient of x")
    named = {"hidden_states": x} if case == "called otherwise" else {}
    block.norm.weight.requires_grad_(case == "trained")
    with torch.no_grad() if case == "evaluated" else nullcontext():
        y = block.norm(**named) if named else block.norm(x)
    assert not counted
    assert torch.equal(y, type(block.norm).forward(block.norm, x))
    if case == "trained":
        y.sum().backward()
        assert block.norm.weight.grad.any()


def test_an_output_that_was_written_to_is_kept(counted: Counter[str]) -> None:
    class Doubling(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            first = self.linears[0](y.clone())
            y.mul_(2)
            return torch.cat([first, self.linears[1](y)], -1)

    block = Doubling()
    x = torch.randn(TOKENS, WIDTH)
    found = gradients(block, block, x)
    assert counted["KeepInput.forward"] == 2
    twin = stock(block)
    for one, other in zip(found, gradients(twin, twin, x), strict=True):
        assert torch.equal(one, other)


def test_a_norm_that_takes_a_gate_may_be_given_one() -> None:
    class GatedNorm(nn.Module):
        def __init__(self, n: int) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(n))

        def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
            return self.weight * (x if gate is None else x * gate)

    model = nn.ModuleList([GatedNorm(8)]).requires_grad_(False)
    x = torch.randn(5, 8, requires_grad=True)
    for use in (use_kept_norms, use_tiled_norms):
        assert use(model) == ["0"]
        assert torch.equal(model[0](x, x), x * x)
        assert torch.equal(model[0](x, gate=x), x * x)
        assert torch.equal(model[0](x), x)


def test_copies_and_pickles_have_norms_of_their_own() -> None:
    model = attached("llama")
    twin = copy.deepcopy(model)
    other = lifted(twin).model.norm
    assert other.forward.args[0] is other
    assert same(step(model), step(twin))
