"""The embedding, the output head and its loss, against dense ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import make_base, relative_error
from torch import Tensor, nn

from leanlift.layers import cpu_product
from leanlift.layers.embedding import FrozenEmbedding
from leanlift.layers.frozen_head import FrozenHead
from leanlift.layers.lm_head import Finish, Head, Objective, head_loss
from leanlift.measure import LiveBytes
from leanlift.tiles import DenseTiles
from leanlift.weights.quantized import WeightFormat, embedding_rows, frozen_weight, requantize

T, D, V = 33, 48, 1007


def problem(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(T, D).to(dtype)
    weight = (torch.randn(V, D) / 3).to(dtype)
    return hidden, weight, torch.randn(V).to(dtype), torch.randint(V, (T,))


OBJECTIVES = {
    "likelihood": Objective(),
    "smoothed": Objective(smoothing=0.1),
    "by confidence": Objective(by_confidence=True),
    "both": Objective(0.3, True),
}


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    cap: float | None,
    objective: Objective = OBJECTIVES["likelihood"],
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    hidden = hidden.detach().clone().requires_grad_()
    logits = F.linear(hidden, weight, bias)
    if logits.dtype != torch.float64:
        logits = logits.float()
    logits = logits * scale
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    cost = F.cross_entropy(logits, labels, reduction="none", label_smoothing=objective.smoothing)
    if objective.by_confidence:
        cost = cost * logits.softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1).detach()
    loss = cost.sum() / 7
    loss.backward()
    assert hidden.grad is not None
    return loss.detach(), hidden.grad


@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize(("cap", "scale"), [(None, 1.0), (None, 0.3), (3.0, 2.5)])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tile_bytes", [1, 50_000, 4 * T * V, 2**25])  # the last two keep products
def test_loss_and_gradient_are_those_of_whole_logits(
    kind: str,
    cap: float | None,
    scale: float,
    with_bias: bool,
    dtype: torch.dtype,
    tile_bytes: int,
) -> None:
    hidden, weight, bias, labels = problem(dtype)
    objective = OBJECTIVES[kind]
    used = bias if with_bias else None
    wide_bias = bias.double() if with_bias else None
    rest = labels, cap, objective, scale
    exact, exact_grad = plain(hidden.double(), weight.double(), wide_bias, *rest)
    stock, stock_grad = plain(hidden, weight, used, *rest)
    ours = hidden.clone().requires_grad_()
    head = Head(DenseTiles(weight), used, cap, scale)
    got = head_loss(ours, labels, head, 7, tile_bytes, objective)
    (4 * got.loss).backward()
    assert ours.grad is not None
    assert ours.grad.dtype == dtype
    # bf16: one rounding more, of each tile's product
    limit = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2**-9}[dtype]
    for one, truth, reference in (
        (got.loss, exact, stock),
        (ours.grad / 4, exact_grad, stock_grad),
    ):
        assert relative_error(one, truth) <= limit + relative_error(reference, truth)


def test_entropy_and_correct_tokens() -> None:
    hidden, weight, bias, labels = problem()
    logits = F.linear(hidden, weight, bias).double()
    labels[::2] = logits.argmax(1)[::2]
    chance = logits.softmax(1)
    got = head_loss(hidden, labels, Head(DenseTiles(weight), bias), 1, 40_000)
    torch.testing.assert_close(got.entropy.double(), -(chance * chance.log()).sum())
    assert got.correct == (logits.argmax(1) == labels).sum()


def test_a_finish_is_that_of_the_first_rows() -> None:
    hidden, weight, bias, _ = problem()
    head = Finish(2.0, 5.0, 100).of(Head(DenseTiles(weight), bias))
    assert head.weight.shape == (100, D)
    logits = head.logits(head.product(hidden, head.rows(0, 100, hidden.dtype)), 0)
    wanted = 5 * torch.tanh(2 * (hidden @ weight.T + bias) / 5)
    torch.testing.assert_close(logits, wanted[:, :100])


def test_no_token_gives_zero() -> None:
    hidden = torch.randn(0, D, requires_grad=True)
    empty = torch.empty(0, dtype=torch.int64)
    got = head_loss(hidden, empty, Head(DenseTiles(torch.randn(V, D))), 1)
    got.loss.backward()
    assert got.loss == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, D)


def test_whole_logits_are_never_there() -> None:
    tokens, width, vocabulary = 512, 64, 32000
    hidden = torch.randn(tokens, width, requires_grad=True)
    head = Head(frozen_weight(make_base("int8", vocabulary, width)))
    with LiveBytes() as live:
        head_loss(hidden, torch.randint(vocabulary, (tokens,)), head, 1, 2**21).loss.backward()
    assert live.peak <= 4 * 2**21 + 5 * hidden.nbytes
    assert live.peak < tokens * vocabulary * 4 / 6


def test_products_are_kept_as_narrow_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, width, vocabulary, tile = 256, 64, 8192, 2**22
    weight = DenseTiles(torch.randn(vocabulary, width).bfloat16())
    hidden = torch.randn(tokens, width).bfloat16().requires_grad_()
    made = 0
    product = Head.product

    def counting(*args: Any) -> Tensor:
        nonlocal made
        made += 1
        return product(*args)

    monkeypatch.setattr(Head, "product", counting)
    labels = torch.randint(vocabulary, (tokens,))
    with LiveBytes() as live:
        head_loss(hidden, labels, Head(weight, stands_for="cuda"), 1, tile).loss.backward()
    assert made == 2  # one a tile: none is made for the gradient again
    whole = 2 * tokens * vocabulary
    assert whole <= tile < 2 * whole
    # beside them a tile's logits and shares, in fp32, and what is narrow
    assert live.peak <= whole + 2 * tile + tile // 8


@pytest.mark.parametrize("kind", ["nf4", "int8", "dense"])
@pytest.mark.parametrize("bias", [False, True])
def test_a_frozen_head_is_its_dequantized_weight(kind: str, bias: bool) -> None:
    base = make_base(kind, 700, 128, bias=bias)
    weight = frozen_weight(base)
    dense = weight.rows(0, 700)
    head = FrozenHead(base, weight, base.bias.data if bias else None)
    x = torch.randn(3, 5, 128, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    out, wanted = head(x), F.linear(y, dense, base.bias if bias else None)
    torch.testing.assert_close(out, wanted)
    grad = torch.randn_like(out)
    out.backward(grad)
    wanted.backward(grad)
    torch.testing.assert_close(x.grad, y.grad)
    assert (head.in_features, head.out_features) == (128, 700)


def test_an_int8_embedding_looks_up_dequantized_rows() -> None:
    weight = torch.randn(100, 32).bfloat16()
    tiles: Any = requantize(weight, WeightFormat("int8", "float32"), torch.device("cpu"))
    ids = torch.randint(100, (2, 7))
    for stays in (False, True):
        embedding = FrozenEmbedding(tiles.module, embedding_rows, torch.bfloat16, stays)
        got = embedding(ids)
        assert got.dtype == torch.bfloat16
        assert torch.equal(got, tiles.rows(0, 100)[ids].bfloat16())
        assert relative_error(got.float(), weight[ids].double()) < 0.01
        assert ("storage" in dict(embedding.named_modules())) != stays
    dense = FrozenEmbedding(
        nn.Embedding.from_pretrained(weight), embedding_rows, weight.dtype, True
    )
    assert torch.equal(dense(ids), weight[ids])


@pytest.mark.parametrize("stands_for", [None, "cpu", "cuda"])
def test_a_head_on_a_cpu_multiplies_as_the_layers_there(
    stands_for: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In both directions, in the loss and for whole logits; a plan for a card does not."""
    asked: list[str] = []
    for name in ("times", "times_turned"):
        own = getattr(cpu_product, name)

        def spy(*given: Any, name: str = name, own: Any = own, **named: Any) -> None:
            asked.append(name)
            own(*given, **named)

        monkeypatch.setattr(f"leanlift.layers.lm_head.{name}", spy)
    tiles = DenseTiles(torch.randn(96, 16))
    hidden = torch.randn(5, 16, requires_grad=True)
    head = Head(tiles, stands_for=stands_for)
    head_loss(hidden, torch.arange(5), head, 1).loss.backward()
    module = FrozenHead(nn.Linear(16, 96), tiles)
    module.stands_for = stands_for
    module(hidden).sum().backward()
    once = {"times", "times_turned"} if stands_for != "cuda" else set()
    assert {*asked} == once
    assert len(asked) == 2 * len(once)
