"""The cross-entropy over a frozen output head.

The head may be held in INT8, and the whole logits are never there: with a vocabulary of 128k they
would be the largest tensor of all. The loss goes over the vocabulary in tiles, twice: once for
the log-sum-exp, kept running, and once for the gradient of the hidden states, which is formed in
the forward pass already, since the head itself has none. Where the products of all tiles together
are no larger than one may be, they are kept from the first time to the second.

Shapes: T tokens, d width, V vocabulary, v columns of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from leanlift.layers.cpu_product import part_of, times, times_turned
from leanlift.layers.once import once
from leanlift.tiles import RangeTiles, RowTiles, row_ranges

TILE_BYTES = 32 * 2**20


@dataclass(frozen=True)
class Head:
    """An output head: logits = scale * (x W^T + bias), then capped.

    Attributes:
        weight: W [V, d] by rows, dequantized as they are read.
        bias: [V] or None.
        softcap: c of c * tanh(logits / c), as Gemma 2 has it; None: no cap.
        scale: what the product and the bias are multiplied by.
        stands_for: the kind of device that it is taken to be on, as `Workspace` has it.
    """

    weight: RowTiles
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0
    stands_for: str | None = None

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """W[start:stop] in the dtype of the computation."""
        return self.weight.rows(start, stop).to(dtype)

    def logits(self, product: Tensor, start: int) -> Tensor:
        """Logits of a product [T, v], whose first entry is the vocabulary's `start`: in fp32 (fp64
        where that is), the product itself where nothing is made of it.

        It is rounded to the dtype of x, as in the stock model; what follows is not.
        """
        logits = product if product.dtype == torch.float64 else product.float()
        if self.bias is not None:
            logits = logits + self.bias[start : start + logits.shape[1]].to(logits.dtype)
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = logits.div(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def product(self, x: Tensor, rows: Tensor) -> Tensor:
        """x W^T [T, v], in their dtype."""
        if not self.on_cpu:
            return x @ rows.T
        product = x.new_empty(x.shape[0], rows.shape[0])
        times_turned(x, part_of(rows), product)
        return product

    def add_product_back(self, slope: Tensor, rows: Tensor, gradient: Tensor) -> None:
        """Add to the gradient of x [T, d], in fp32 (fp64), that of logits [T, v] times W."""
        if self.on_cpu:
            times(slope, part_of(rows), gradient, adds=True)
        else:
            gradient += slope @ rows

    @property
    def on_cpu(self) -> bool:
        """Whether it is on a CPU, or stands for one that is."""
        return (self.stands_for or self.weight.device.type) == "cpu"


@dataclass(frozen=True)
class Finish:
    """What a model makes of the product of its hidden states with its head's weight.

    Attributes:
        scale, softcap: as in `Head`.
        rows: entries of the vocabulary that have logits, the first ones; None: all.
    """

    scale: float = 1.0
    softcap: float | None = None
    rows: int | None = None

    def of(self, head: Head) -> Head:
        """A plain head, finished so."""
        weight, bias = head.weight, head.bias
        if self.rows is not None:
            weight = RangeTiles(weight, 0, self.rows)
            bias = None if bias is None else bias[: self.rows]
        return Head(weight, bias, self.softcap, self.scale, head.stands_for)


@dataclass(frozen=True)
class Objective:
    """What a token costs, given its log-probability ln p and those of all entries, ln p_v.

    Attributes:
        smoothing: ε of label smoothing, -(1 - ε) ln p - ε mean_v ln p_v; 0: none.
        by_confidence: whether a token's cost is multiplied by its probability p, which is taken as
            a constant (dynamic fine-tuning, arXiv 2508.05629).
    """

    smoothing: float = 0.0
    by_confidence: bool = False


LIKELIHOOD = Objective()


@dataclass(frozen=True)
class HeadLoss:
    """loss: a scalar. entropy: summed over the tokens. correct: tokens whose label is the most
    likely one. The latter two carry no gradient."""

    loss: Tensor
    entropy: Tensor
    correct: Tensor


def head_loss(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    divisor: Tensor | float,
    tile_bytes: int = TILE_BYTES,
    objective: Objective = LIKELIHOOD,
) -> HeadLoss:
    """Summed cost of the tokens over `divisor`, without the logits.

    Args:
        hidden: [T, d]; the computation has its dtype, sums are in fp32.
        labels: int64 [T], each in 0..V-1: drop ignored positions before.
        head: where the logits come from.
        divisor: tokens that the loss is divided by: of the whole accumulated batch, in training.
        tile_bytes: about how large a tile of logits, and one of the weight, may be.
        objective: what a token costs: cross-entropy unless told otherwise.
    """
    if not isinstance(divisor, Tensor):  # made on the device: a copy there would be waited for
        divisor = torch.full((), divisor, device=hidden.device)
    divisor = divisor.to(hidden.device)
    loss, entropy, correct = _HeadLoss.apply(hidden, labels, head, divisor, tile_bytes, objective)
    return HeadLoss(loss, entropy, correct)


def tile_columns(tokens: int, width: int, itemsize: int = 4, tile_bytes: int = TILE_BYTES) -> int:
    """Entries of the vocabulary that the loss goes over at once, for T tokens of width d."""
    return max(64, tile_bytes // (itemsize * max(tokens, width, 1)))


def kept_columns(tokens: int, itemsize: int, tile_bytes: int = TILE_BYTES) -> int:
    """Entries of the largest vocabulary whose products, of `itemsize` bytes a number, are all kept
    from the first time to the second."""
    return tile_bytes // (itemsize * max(1, tokens))


def next_tokens(outputs: Tensor, labels: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of outputs [B, S, d] those at `places` int64 [T] of flattened [B, S], and the labels [T] of
    the tokens behind them."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    return flat.index_select(0, places), labels.reshape(-1).index_select(0, places + 1)


def whole_cost(logits: Tensor, wanted: Tensor, objective: Objective = LIKELIHOOD) -> Tensor:
    """Summed cost of tokens from whole logits [T, V]."""
    costs = F.cross_entropy(logits, wanted, reduction="none", label_smoothing=objective.smoothing)
    if objective.by_confidence:
        with torch.no_grad():
            chances = -F.cross_entropy(logits, wanted, reduction="none")
        costs = costs * chances.exp()
    return costs.sum()


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        head: Head,
        divisor: Tensor,
        tile_bytes: int,
        objective: Objective,
    ) -> tuple[Tensor, Tensor, Tensor]:
        tokens, width, vocabulary = *hidden.shape, head.weight.shape[0]
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        step = tile_columns(tokens, width, wide.itemsize, tile_bytes)
        keeps = vocabulary <= kept_columns(tokens, hidden.dtype.itemsize, tile_bytes)
        kept: list[Tensor] = []
        most = torch.full((tokens,), -torch.inf, dtype=wide, device=hidden.device)
        total, weighted, own, mean = (torch.zeros_like(most) for _ in range(4))
        for start, stop in row_ranges(vocabulary, step):
            product = head.product(hidden, head.rows(start, stop, hidden.dtype))
            if keeps and ctx.needs_input_grad[0]:
                kept.append(product)
            logits = head.logits(product, start)
            del product
            own = torch.where(_within(labels, start, stop), _pick(logits, labels, start), own)
            if objective.smoothing:
                mean = mean + logits.sum(1) / vocabulary
            larger = torch.maximum(most, logits.amax(1))
            shrink = (most - larger).exp()
            share = (logits - larger.unsqueeze(1)).exp_()
            total = total * shrink + share.sum(1)
            weighted = weighted * shrink + share.mul_(logits).sum(1)
            most = larger
            del logits, share  # before the next tile is made
        normalizer = most + total.log()
        weights = (own - normalizer).exp() if objective.by_confidence else torch.ones_like(own)
        if ctx.needs_input_grad[0]:
            share = weights / divisor
            epsilon = objective.smoothing
            gradient = _gradient(hidden, labels, head, normalizer, share, epsilon, step, kept)
            ctx.save_for_backward(gradient)
        wanted = own + objective.smoothing * (mean - own) if objective.smoothing else own
        loss = ((normalizer - wanted) * weights).sum() / divisor
        entropy, correct = (normalizer - weighted / total).sum(), (own >= most).sum()
        ctx.mark_non_differentiable(entropy, correct)
        return loss, entropy, correct

    @staticmethod
    @once
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_loss.to(gradient.dtype), None, None, None, None, None


def _gradient(
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    normalizer: Tensor,
    shares: Tensor,
    smoothing: float,
    step: int,
    kept: list[Tensor],
) -> Tensor:
    """d loss / d hidden [T, d] in the dtype of `hidden`, summed over tiles in fp32.

    `shares` [T] is what a token's cost is multiplied by. `kept` holds the products of all tiles, or
    is empty; it is empty afterwards.
    """
    wide, vocabulary = normalizer.dtype, head.weight.shape[0]
    gradient = torch.zeros(hidden.shape, dtype=wide, device=hidden.device)
    for start, stop in row_ranges(vocabulary, step):
        rows = head.rows(start, stop, hidden.dtype)
        logits = head.logits(kept.pop(0) if kept else head.product(hidden, rows), start)
        slope = (logits - normalizer.unsqueeze(1)).exp_()  # the probabilities, then minus one-hot
        place = (labels - start).clamp(0, stop - start - 1).unsqueeze(1)
        own = _within(labels, start, stop).to(wide) * (smoothing - 1)
        slope.scatter_add_(1, place, own.unsqueeze(1))
        if smoothing:
            slope.sub_(smoothing / vocabulary)
        if head.softcap is not None:
            slope.mul_(logits.div_(head.softcap).square_().neg_().add_(1))
        del logits
        slope = slope.mul_((shares * head.scale).unsqueeze(1)).to(hidden.dtype)
        head.add_product_back(slope, rows, gradient)
        del slope
    return gradient.to(hidden.dtype)


def _within(labels: Tensor, start: int, stop: int) -> Tensor:
    return (labels >= start) & (labels < stop)


def _pick(logits: Tensor, labels: Tensor, start: int) -> Tensor:
    place = (labels - start).clamp(0, logits.shape[1] - 1)
    return logits.gather(1, place.unsqueeze(1)).squeeze(1)
