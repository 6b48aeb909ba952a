"""The last Linear of a gated MLP keeps no input of its own: the same bits, a tensor less."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from families import config_of
from helpers import saved_nbytes
from recomputing import RUNS, Run, gradients
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from leanlift import LiftConfig, get_lift_model
from leanlift.layers import LiftLinear, made_again
from leanlift.layers.autograd import KeepInput, in_backward_pass
from leanlift.layers.fused_glu import OurForward, fused_glu, use_fused_glu, use_stock_glu
from leanlift.layers.kept_factors import last_input
from leanlift.layers.made_again import KeepSources
from leanlift.layers.mlp_ways import Way, way_of
from leanlift.measure import LiveBytes
from leanlift.model import lifted, tiled_mlp

TOKENS = 40
WIDTH, INNER = 64, 192
ALL = ("gate_proj", "up_proj", "down_proj", "gate_up_proj")


def mlp_of(family: str = "llama", targets: tuple[str, ...] = ALL) -> Any:
    """The MLP of an attached model's first block, with offsets that are not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).requires_grad_(False)
    names = [t for t in targets if any(n.endswith(f".{t}") for n, _ in model.named_modules())]
    config = LiftConfig(selector="random", density=0.1, target_modules=tuple(names))
    mlp = lifted(get_lift_model(model, config, progress=False)).model.layers[0].mlp
    for layer in mlp.modules():
        if isinstance(layer, LiftLinear):
            layer.values.data.normal_(0, 0.01)
    return mlp


def plain(mlp: Any) -> Any:
    """The same MLP, whose last Linear keeps its input: by its family's own forward."""
    twin = copy.deepcopy(mlp)
    for part in twin.modules():
        vars(part).pop("forward", None)
    return twin


def plain_input(last: Any, gate: Tensor, up: Tensor, act: Any, glu: Any) -> Tensor:
    """As `last_input`; the last Linear keeps it."""
    made: Tensor = glu(gate, up, act)
    return made


WAYS: dict[str, Run] = {**RUNS, "called twice": lambda mlp: lambda x: mlp(mlp(x))}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an input was kept, and how often factors were; and made again."""
    found: Counter[str] = Counter()

    def watch(owner: Any, name: str, key: str) -> None:
        own = getattr(owner, name)

        def counting(*args: Any) -> Any:
            found[key] += 1
            return own(*args)

        monkeypatch.setattr(owner, name, counting)

    watch(KeepInput, "forward", "inputs")
    watch(KeepSources, "forward", "factors")
    watch(made_again, "_made", "made")
    return found


@pytest.mark.parametrize("offloaded", [False, True], ids=["", "offloaded"])
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("run", WAYS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_outputs_and_gradients_are_the_same(
    family: str, run: str, autocast: bool, offloaded: bool, kept: Counter[str]
) -> None:
    mlp = mlp_of(family)
    x, found = torch.randn(2, TOKENS, WIDTH), []
    for each in (plain(mlp), mlp):
        kept.clear()
        saving: Any = save_on_cpu() if offloaded else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), saving:
            found.append(gradients(WAYS[run](each), each, x))
    assert kept["factors"] > 0
    assert kept["inputs"] == 2 * kept["factors"]  # of gate and up
    assert len(found[0]) == len(found[1]) == 5
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    layer = mlp.down_proj
    assert not layer.workspace.products


@pytest.mark.parametrize("run", ["as it is", "recomputed"])
def test_both_factors_of_one_linear(run: str) -> None:
    mlp = mlp_of("phi3, fused")
    way = way_of(mlp)
    assert isinstance(way, Way)
    assert way.gated
    ours = copy.deepcopy(mlp)
    ours.forward = OurForward(way, ours)
    x = torch.randn(2, TOKENS, WIDTH)
    one, other = (gradients(RUNS[run](each), each, x) for each in (plain(mlp), ours))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_recomputed_is_not_made_once_more(kept: Counter[str]) -> None:
    mlp, x = mlp_of(), torch.randn(TOKENS, WIDTH)
    gradients(mlp, mlp, x)
    assert kept["made"] == 1
    for run in ("recomputed", "recomputed by another pass"):
        kept.clear()
        gradients(RUNS[run](mlp), mlp, x)
        assert kept["made"] == 1, run  # by the recomputation


def test_what_a_broken_pass_left_is_not_taken() -> None:
    """A pass that ends in the recomputation, behind the product; then one with other numbers."""
    mlp = mlp_of()
    x, other = torch.randn(TOKENS, WIDTH), torch.randn(TOKENS, WIDTH)
    wanted = gradients(RUNS["recomputed"](mlp), mlp, other)

    def broken(*_: Any) -> None:
        if in_backward_pass():
            raise KeyboardInterrupt

    handle = mlp.down_proj.register_forward_pre_hook(broken)
    with set_checkpoint_early_stop(False), pytest.raises(KeyboardInterrupt):
        gradients(RUNS["recomputed"](mlp), mlp, x)
    handle.remove()
    assert mlp.down_proj.workspace.products
    for run in ("as it is", "recomputed"):
        found = gradients(RUNS[run](mlp), mlp, other)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_seventh_of_what_is_kept_is_not() -> None:
    mlp = mlp_of()
    x = torch.randn(TOKENS, WIDTH, requires_grad=True)
    small, wide = x.nbytes, TOKENS * INNER * 4
    assert saved_nbytes(mlp, x) == small + 2 * wide
    use_stock_glu(mlp)
    assert saved_nbytes(mlp, x) >= small + 3 * wide
    use_fused_glu(mlp)
    assert saved_nbytes(mlp, x) == small + 2 * wide


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_pass_peaks_no_higher(recomputed: bool) -> None:
    """h is gone before the gradients of its factors are made."""
    mlp = mlp_of()
    x = torch.randn(4000, WIDTH, requires_grad=True)
    with LiveBytes() as live:
        y = RUNS["recomputed" if recomputed else "as it is"](mlp)(x)
        y.sum().backward()
    wide = 4000 * INNER * 4
    # gate, up, the gradients of h, gate and up; what is narrow is a third of a wide one
    assert live.peak <= 5 * wide + wide / 2


def test_offsets_that_change_before_the_backward_pass_are_noticed() -> None:
    mlp = mlp_of()
    y = mlp(torch.randn(TOKENS, WIDTH, requires_grad=True)).sum()
    with torch.no_grad():
        mlp.down_proj.values.add_(1)
    with pytest.raises(RuntimeError, match="changed between its forward and its backward"):
        y.backward()


def test_no_more_is_there_when_gradients_come() -> None:
    """What came from the output, of which nobody else has the gradient, is gone before those of the
    factors are made, and h before the values' gradient is used."""
    mlp = mlp_of()
    gate, up = (torch.randn(500, INNER, requires_grad=True) for _ in range(2))
    found: list[int] = []
    for given, input_of in ((mlp.down_proj, last_input), (plain(mlp).down_proj, plain_input)):
        with LiveBytes() as live:

            def used(values: Tensor, live: LiveBytes = live) -> None:
                found.append(live.current)
                values.grad = None

            given.values.register_post_accumulate_grad_hook(used)
            h = input_of(given, gate, up, mlp.act_fn, fused_glu)
            y = 1 * given(h)
            del h
            y.sum().backward()
            del y
        found.append(live.peak)
    (ours, our_peak), (other, other_peak) = found[:2], found[2:]
    assert ours <= other
    assert our_peak <= other_peak


@pytest.mark.parametrize("case", ["frozen", "no gradient of x", "evaluated", "observed", "off"])
def test_where_no_input_is_kept_the_plain_way_is_gone(case: str, kept: Counter[str]) -> None:
    targets = ("gate_proj", "up_proj") if case == "frozen" else ALL
    targets = ("down_proj",) if case == "no gradient of x" else targets
    mlp = mlp_of(targets=targets)
    x = torch.randn(TOKENS, WIDTH, requires_grad=case != "no gradient of x")
    if case == "observed":
        mlp.down_proj.observer = lambda *_: None
    if case == "off":
        mlp.down_proj.workspace.off = True
    with torch.no_grad() if case == "evaluated" else nullcontext():
        mlp(x)
    assert kept["factors"] == 0


def test_hooks_of_the_last_linear_are_called_and_may_give_another_input() -> None:
    mlp = mlp_of()
    x = torch.randn(TOKENS, WIDTH)
    for change in (lambda h: h, lambda h: 2 * h):
        found = []
        for each in (plain(mlp), mlp):
            handle = each.down_proj.register_forward_pre_hook(lambda _, args: (change(args[0]),))  # noqa: B023
            found.append(gradients(each, each, x))
            handle.remove()
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_stock_linear_at_the_end_is_called() -> None:
    gate, up = (torch.randn(3, 8, requires_grad=True) for _ in range(2))
    last, glu = nn.Linear(8, 4), lambda gate, up, act: act(gate) * up
    y = last(last_input(last, gate, up, torch.relu, glu))
    assert torch.equal(y, last(torch.relu(gate) * up))


@pytest.mark.parametrize("way", ["as it is", "in pieces"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_torch_can_count_the_operations_of_a_step(family: str, way: str) -> None:
    """Its tracker of modules may not meet the leaves of graphs of ours."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_of(family)).requires_grad_(False)
    model = get_lift_model(model, LiftConfig(selector="random", density=0.1), progress=False)
    if way == "in pieces":
        tiled_mlp(lifted(model), 8)
    ids = torch.randint(64, (2, TOKENS))
    counted = []
    for follows in (False, True):
        model.zero_grad()
        with FlopCounterMode(display=False) if follows else nullcontext() as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        counted.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert counter.get_total_flops() > 0
    assert all(torch.equal(one, other) for one, other in zip(*counted, strict=True))
