"""Liger's kernels between the products: taken where they compute what a model does, and planned."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config_of
from processes import run_python
from sweeps import swept
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from leanlift import LiftConfig, UserError, get_lift_model
from leanlift.layers import LiftLinear
from leanlift.layers.fused_elementwise import (
    Rotary,
    _form_of_class,
    _kind_of,
    _rotates_halves,
    _rotating,
    check_kernels,
    fused_kernel_glu,
    launches,
)
from leanlift.layers.fused_glu import use_stock_glu
from leanlift.measure import LiveBytes
from leanlift.model import fused_elementwise, lifted, tiled_mlp
from leanlift.model.tiled import check_fused
from leanlift.plan.base import without_packing_search
from leanlift.plan.fake import StepBytes, attach_fake, fake_tensors, step_peak
from leanlift.plan.loss import loss_of_all_tokens
from leanlift.plan.pieces import first_pieces
from leanlift.weights.quantized import WeightFormat

liger = pytest.importorskip("liger_kernel", reason="Liger has no build for this platform")
HERE = Path(__file__).parent
CONFIG = LiftConfig(selector="magnitude", density=0.05)
TOKENS = 600

PARTS = {
    "llama": {"norms": 5, "rotary": 2, "mlps": 2},
    "gemma2": {"norms": 9, "rotary": 2, "mlps": 2},
    "qwen3": {"norms": 9, "rotary": 2, "mlps": 2},
    "phi3, fused": {"norms": 5, "rotary": 2, "mlps": 2},
}
"""Two blocks and the norm behind them; heads of some have norms of their own."""


def build(family: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **more), dtype=torch.float32)


# --- which parts ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", list(PARTS))
def test_parts_are_found_by_what_they_compute(family: str) -> None:
    model = build(family).requires_grad_(False)
    assert fused_elementwise(get_lift_model(model, CONFIG, progress=False)) == PARTS[family]


class Odd(nn.Module):
    """Almost an RMSNorm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps))


def test_forms_are_told_apart() -> None:
    from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm

    found = [_form_of_class(kind) for kind in (LlamaRMSNorm, Gemma2RMSNorm, GptOssRMSNorm)]
    assert found == [(0.0, "llama"), (1.0, "gemma"), (0.0, "gemma")]
    assert [_form_of_class(kind) for kind in (Odd, nn.LayerNorm, nn.Linear)] == [None] * 3
    assert [_kind_of(kind) for kind in (nn.SiLU, nn.GELU, nn.ReLU)] == ["silu", None, None]


def test_an_embedding_that_turns_neighbours_is_not_taken() -> None:
    from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as neighbours
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as halves

    assert _rotates_halves(getattr(halves, "stock", halves))
    assert not _rotates_halves(neighbours)


def test_a_plan_that_asks_first_is_told_the_same() -> None:
    """What is tried, is tried on numbers, also where everything that is made has none; the answer
    is kept for the run that comes after."""
    from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb as halves

    for known in (_kind_of, _form_of_class):
        known.cache_clear()
    with fake_tensors():
        assert (_kind_of(nn.SiLU), _kind_of(nn.ReLU)) == ("silu", None)
        assert _form_of_class(LlamaRMSNorm) == (0.0, "llama")
        assert _rotates_halves(getattr(halves, "stock", halves))
    assert _kind_of(nn.SiLU) == "silu"


def test_a_trained_norm_and_somebody_elses_forward_are_left() -> None:
    model = build("llama").requires_grad_(False)
    model.model.norm.weight.requires_grad_()
    model.model.layers[0].mlp.forward = lambda x: x
    lift = get_lift_model(model, CONFIG, progress=False)
    model.model.norm.weight.requires_grad_()
    assert fused_elementwise(lift) == {"norms": 4, "rotary": 2, "mlps": 1}


def test_a_model_on_a_cpu_computes_as_before() -> None:
    model = build("llama").requires_grad_(False)
    ids = torch.arange(60).view(2, 30)
    before = model(input_ids=ids).logits
    lift = get_lift_model(model, CONFIG, progress=False)
    assert not launches(before)
    fused_elementwise(lift)
    assert torch.equal(model(input_ids=ids).logits, before)


def test_where_it_cannot_be_had_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="fused_elementwise needs a GPU: "):
        check_kernels(cuda=False)
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with pytest.raises(UserError, match=r"needs Liger's kernels.*install leanlift\[liger\]"):
        check_kernels(cuda=True)
    lift = get_lift_model(build("gpt2, turned"), CONFIG, progress=False)
    with pytest.raises(UserError, match="no norm, rotary embedding or gated MLP of this GPT2"):
        check_fused(lift)


# --- what they compute ------------------------------------------------------------------------


@pytest.mark.parametrize("family", swept(list(PARTS), "llama"))
def test_a_step_is_the_same_within_rounding(family: str) -> None:
    done = run_python(str(HERE / "interpreted_liger.py"), family)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["loss"] < 1e-6
    assert found["logits"] < 5e-6
    assert 0 < found["gradients"] < 5e-6, "other arithmetic, the same numbers"
    assert found["stock again"]


# --- what they take ---------------------------------------------------------------------------


class NoLaunch:
    """A kernel that is not run: what is allocated around it is as ever."""

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: None


@pytest.fixture
def unlaunched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's functions on a CPU, without their kernels; pieces are small."""
    for module in ("geglu", "rms_norm", "rope", "swiglu"):
        ops = __import__(f"liger_kernel.ops.{module}", fromlist=["ops"])
        for name in dir(ops):
            if name.endswith("_kernel") or name == "_triton_rope":
                monkeypatch.setattr(ops, name, NoLaunch())
    monkeypatch.setattr("leanlift.layers.fused_elementwise._interpreted", lambda: True)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.LEAST", 64)
    monkeypatch.setattr("leanlift.layers.tiled_mlp.MOST", 128)


WIDE = {"intermediate_size": 512, "max_position_embeddings": 1024}


def changed(model: Any, tiled: bool) -> Any:
    fused_elementwise(model)
    if tiled:
        tiled_mlp(model, fused=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def planned(family: str, tiled: bool) -> StepBytes:
    with without_packing_search(), fake_tensors():
        model = build(family, **WIDE)
        attach_fake(model, CONFIG, WeightFormat("dense", "float32"), False, first_pieces("cpu"))
        model = changed(model, tiled)
        return step_peak(model, loss_of_all_tokens, 1, TOKENS, True, False, False)


def measured(family: str, tiled: bool) -> int:
    model = changed(lifted(get_lift_model(build(family, **WIDE), CONFIG, progress=False)), tiled)
    for layer in model.modules():
        if isinstance(layer, LiftLinear):
            layer.values.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    ids = torch.randint(3, 60, (1, TOKENS))
    for _ in range(2):  # scratch and buffers are there from the first
        with LiveBytes() as live:
            loss_of_all_tokens(model, ids, ids.clone()).backward()
    return live.peak


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable. is deprecated")
@pytest.mark.parametrize("tiled", swept([False, True], False))
@pytest.mark.parametrize("family", swept(list(PARTS), "llama"))
def test_the_peak_is_that_of_a_real_step(family: str, tiled: bool, unlaunched: None) -> None:
    assert planned(family, tiled).peak == pytest.approx(measured(family, tiled), rel=0.02)


def _glu(x: Tensor) -> Tensor:
    return fused_kernel_glu(x * 1, x * 2, nn.SiLU())


def _norm(x: Tensor) -> Tensor:
    norm = LlamaRMSNorm(64).requires_grad_(False)
    fused_elementwise(norm)
    return norm(x * 1)


def _rotary(x: Tensor) -> Tensor:
    q, k = ((x * i).view(2, 300, 4, 16).transpose(1, 2) for i in (1, 2))
    cos = torch.ones(2, 300, 16)
    with _rotating():
        q, k = Rotary(lambda *given: (_ for _ in ()).throw(AssertionError))(q, k, cos, cos)
    return torch.cat([q, k])


@pytest.mark.parametrize("part", [_glu, _norm, _rotary])
def test_a_plan_has_what_each_kernel_keeps_and_makes(
    part: Callable[[Tensor], Tensor], unlaunched: None
) -> None:
    found = []
    gc.collect()  # or what an earlier test left goes meanwhile
    for numbers in (nullcontext, fake_tensors):
        with numbers():
            x = torch.ones(2, 300, 64, requires_grad=True)
            with LiveBytes() as live:
                y = part(x)
                kept, live.peak = live.current, live.current
                y.backward(torch.ones_like(y))
            found.append((kept, live.peak))
    assert found[0] == found[1]


def test_heads_that_are_rotated_in_part_are_left_to_their_family(unlaunched: None) -> None:
    q, cos = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 4)
    stock = Rotary(lambda *given: ("stock", "stock"))  # type: ignore[arg-type, return-value]
    with _rotating():
        assert stock(q, q, cos, cos) == ("stock", "stock")
        assert stock(q, q, cos.repeat(1, 1, 2), cos.repeat(1, 1, 2)) != ("stock", "stock")
    assert stock(q, q, cos.repeat(1, 1, 2), cos.repeat(1, 1, 2)) == ("stock", "stock")


def test_a_gated_mlp_takes_less(unlaunched: None) -> None:
    x = torch.randn(1, 2000, 64, requires_grad=True)
    peaks = []
    for fused in (False, True):
        model = build("llama").requires_grad_(False)
        mlp = lifted(get_lift_model(model, CONFIG, progress=False)).model.layers[0].mlp
        if fused:
            fused_elementwise(mlp)
        else:
            use_stock_glu(mlp)
        with LiveBytes() as live:
            mlp(x).sum().backward()
        peaks.append(live.peak)
    wide = 2000 * 192 * 4
    assert peaks[0] - peaks[1] >= 1.5 * wide
