"""A training step that allocates nothing: the real model and layers under fake tensors.

Fake tensors have shapes, dtypes and storages of a size, but no memory behind them. The model is
built by transformers from its configuration, its Linears are replaced by our layers over storage
without contents, and forward and backward run as they would in training, while `LiveBytes` keeps
the peak. So a plan does not guess activations. What is not run here is the optimizer's step,
whose temporaries have a rule of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from leanlift.config import LiftConfig
from leanlift.layers import FrozenLinear, LiftLinear, Workspace, largest_in_scratch
from leanlift.layers.frozen_head import FrozenHead
from leanlift.measure.live import LiveBytes
from leanlift.model.embeddings import INT8, embedding_to_cpu
from leanlift.model.hidden import base_of
from leanlift.model.stacks import named_parts
from leanlift.model.streaming import has_a_weight, layers_by_block
from leanlift.model.surgery import layers_over, operate
from leanlift.model.targets import find_targets
from leanlift.model.tokens import check_tokens, embedding_name, lift_tokens
from leanlift.model.whole import whole_modules
from leanlift.plan.blocks import Lap, Laps, Repetition, in_part, repeats, repetition, whole_step
from leanlift.plan.pieces import first_pieces
from leanlift.plan.remembered import Most, Remembered, remembering
from leanlift.plan.stand_ins import fused_attention, offloading
from leanlift.plan.unloaded import planned_weights
from leanlift.sparse import SEGMENT, SegmentedIndex
from leanlift.tiles import part_shape, parts_of
from leanlift.weights.empty import empty_weight
from leanlift.weights.quantized import Weight8bit, WeightFormat

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
"""Loss of a model on input ids [B, S] and labels [B, S]."""


@dataclass(frozen=True)
class StepBytes:
    """Bytes of a step beyond what stays: the peak in the forward pass up to the hidden states, the
    peak in the loss, what is kept for the backward pass, and the peak in that."""

    forward: int
    loss: int
    kept: int
    backward: int

    @property
    def peak(self) -> int:
        """The most bytes at once, in whichever part of the step."""
        return max(self.forward, self.loss, self.backward)

    def beside(self, nbytes: int) -> StepBytes:
        """The same with more bytes that are there all the time."""
        return StepBytes(*(part + nbytes for part in astuple(self)))


@dataclass(frozen=True)
class EvenIndex(SegmentedIndex):
    """An index whose entries are spread evenly over the rows: sizes are known without reading."""

    def _before(self, row: int) -> int:
        return self.count * min(row, self.shape[0]) // self.shape[0]


def even_index(shape: tuple[int, int], count: int) -> EvenIndex:
    """Storage for `count` positions of an m x n matrix, without contents."""
    m, n = shape
    return EvenIndex(
        shape=shape,
        columns=torch.empty(count, dtype=torch.uint8),
        counts=torch.empty(m, -(-n // SEGMENT), dtype=torch.uint8),
        ends=torch.empty(m, dtype=torch.int32),
        anchors=torch.empty(0, dtype=torch.int64),
    )


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Everything made inside is fake, on the "CPU", whatever the machine has."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cpu"):
        yield


def attach_fake(
    model: Any,
    config: LiftConfig,
    fmt: WeightFormat,
    embedding_on_cpu: bool = False,
    workspace: Workspace | None = None,
    streams: bool = False,
    skipped: Collection[str] | None = None,
) -> dict[str, EvenIndex]:
    """Replace the Linears of a fake 16/32-bit model as loading and attaching would.

    Args:
        model: built under `fake_tensors`.
        config: what is trained.
        fmt: how Linears other than the output head are held.
        embedding_on_cpu: whether the embedding is kept there.
        workspace: of the layers; None: one that stands for a GPU.
        streams: whether the weights of blocks are brought, each by a layer of ours.
        skipped: names of what a checkpoint says that it is not quantized; see `unloaded`.

    Returns:
        The positions of every target, spread evenly.
    """
    wanted, excluded = config.target_modules, config.exclude_modules
    targets = find_targets(model, wanted, excluded, config.selects)
    whole, tokens = whole_modules(model, config), config.trainable_token_indices
    config.check_patterns(targets, whole)
    check_tokens(model, config, max(tokens, default=0) + 1)  # a template may add rows
    embedding = tuple(model.get_input_embeddings().weight.shape)
    targets = [*(name for name in targets if name not in whole), *whole]
    named = [*targets, *(in_blocks(model) if streams else ())]
    weights = planned_weights(model, fmt, named, skipped)
    indices, even = {}, cache(even_index)  # nobody reads them: those alike can be the same
    for name in targets:
        parts, weight = parts_of(weights[name]), weights[name]
        m, n = part_shape(weight)
        count = m * n if name in whole else config.count((m, n), name)
        indices[name] = even(weight.shape, parts * count)
    workspace = workspace or first_pieces("cuda")
    make_layer = layers_over(weights, indices, workspace, getattr(torch, config.values_dtype))
    operate(model, make_layer, _without_numbers if config.quantize_embeddings else None)
    if tokens:
        index = even_index(embedding, len(tokens) * embedding[1])
        lift_tokens(model, tokens, workspace, getattr(torch, config.values_dtype), index)
        indices[embedding_name(model)] = index
    if embedding_on_cpu:
        embedding_to_cpu(model)
    for head in (module for module in model.modules() if isinstance(module, FrozenHead)):
        head.stands_for = workspace.stands_for
    return indices


def in_blocks(model: Any) -> list[str]:
    """The names of what has a weight that is streamed."""
    parts = named_parts(model).items()
    names = {id(part.weight): name for name, part in parts if has_a_weight(part)}
    return [names[id(part.weight)] for block in layers_by_block(model) for part in block]


def _without_numbers(weight: Tensor) -> Weight8bit:
    m, n = weight.shape
    held = empty_weight((m, n), INT8)
    assert isinstance(held, Weight8bit)
    return held


def step_peak(
    model: Any,
    loss: Loss,
    batch: int,
    length: int,
    in_backward: bool,
    accumulate: bool,
    offload: bool = False,
    whole: bool = False,
    elsewhere: Collection[str] = (),
    most: Most | None = None,
) -> StepBytes:
    """Bytes beyond weights, values and scratch of one forward and backward pass.

    Args:
        model: from `attach_fake`, in training mode.
        loss: what is trained on.
        batch, length: of a micro-batch, in rows and tokens.
        in_backward: whether each gradient is freed as soon as it exists.
        accumulate: whether gradients of an earlier micro-batch are there already.
        offload: whether what autograd saves is moved to the CPU.
        whole: whether every block is run, also where they repeat.
        elsewhere: layers whose gradients of an earlier micro-batch are not there: they come with
            their block.
        most: what earlier steps have made, as `remembering` has it; added to.
    """
    most = {} if most is None else most
    way = None if whole else repetition(model)
    accumulating = [
        module
        for name, module in model.named_modules()
        if isinstance(module, LiftLinear) and accumulate and name not in elsewhere
    ]
    earlier = sum(layer.values.nbytes for layer in accumulating)

    def laps(way: Repetition | None) -> list[Lap]:
        there, given = held_scratch(model), (accumulating, offload, way, most)
        done = _laps(model, loss, batch, length, in_backward, *given)
        if held_scratch(model) > there:  # which the next step finds there
            done = _laps(model, loss, batch, length, in_backward, *given)
        return done

    _take_scratch(model)
    if way is not None:
        in_few = laps(way)
        if repeats(in_few, way):
            return _step_bytes(whole_step(in_few, way), earlier)
    return _step_bytes(laps(None), earlier)


def forward_peak(
    model: Any,
    loss: Loss,
    batch: int,
    length: int,
    every_block: bool = False,
    most: Most | None = None,
) -> int:
    """Bytes beyond weights, values and scratch of a forward pass without a backward one, as in an
    evaluation; the arguments are those of `step_peak`. What stays from block to block does not
    grow, so the blocks that show two periods stand for all; not so where a cache is kept, of
    `every_block`."""
    _take_scratch(model)
    ids = torch.zeros(batch, length, dtype=torch.long)
    with (
        in_part(model, None if every_block else repetition(model)),
        fused_attention(),
        torch.no_grad(),
        LiveBytes() as live,
        remembering(model, live, {} if most is None else most),
    ):
        loss(model, ids, ids.clone())
    return live.peak


def _laps(
    model: Any,
    loss: Loss,
    batch: int,
    length: int,
    in_backward: bool,
    accumulating: Sequence[LiftLinear],
    offload: bool,
    way: Repetition | None,
    most: Most,
) -> list[Lap]:
    """The laps of a step through the blocks that `way` says. Gradients of an earlier micro-batch,
    where they accumulate, are there before it, and in no lap."""
    layers = [module for module in model.modules() if isinstance(module, LiftLinear)]
    ids = torch.zeros(batch, length, dtype=torch.long)
    handles: list[Any] = []
    for layer in accumulating:
        layer.values.grad = torch.empty_like(layer.values)
    try:
        with (
            in_part(model, way),
            fused_attention(any(layer.workspace.stands_for == "cuda" for layer in layers)),
            offloading(model, offload),
            LiveBytes() as live,
            remembering(model, live, most) as made,
        ):
            laps = Laps(live)
            handles += [*_at_gradients(layers, made, in_backward), *_at_hidden_states(model, laps)]
            with laps.at_blocks(model, way):
                computed = loss(model, ids, ids.clone())
                laps.mark("loss")
                with laps.backward_pass():
                    computed.backward()
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers:
            layer.values.grad = None
    return laps.done


def _at_gradients(layers: Sequence[LiftLinear], made: Remembered, in_backward: bool) -> list[Any]:
    """Hooks that look at every gradient as training does, and free it if it is used up by then."""

    def seen(values: Tensor) -> None:
        if values.grad is not None:
            made.look(values.grad)
        if in_backward:
            values.grad = None

    return [layer.values.register_post_accumulate_grad_hook(seen) for layer in layers]


def _at_hidden_states(model: Any, laps: Laps) -> list[Any]:
    """Hooks that mark the hidden states: where the base gives them, or, of a model that asks a part
    of it alone, where the head takes them."""

    def mark(*_: Any) -> None:
        if all(lap.mark[0] != "hidden states" for lap in laps.done):
            laps.mark("hidden states")

    head = model.get_output_embeddings()
    at_head = [] if head is None else [head.register_forward_pre_hook(mark)]
    return [base_of(model).register_forward_hook(mark), *at_head]


def _take_scratch(model: Any) -> None:
    """Let the scratch be there already where it is needed, as from the step before."""
    frozen = (p for p in model.parameters() if not p.requires_grad)  # offsets have another dtype
    dtype = next(p.dtype for p in frozen if p.dtype.is_floating_point)
    linears = (module for module in model.modules() if isinstance(module, FrozenLinear))
    largest = largest_in_scratch(linears, dtype)
    if largest is not None:
        largest.scratch.take(*largest.made_at_once, dtype, torch.device("cpu"))


def held_scratch(model: Any) -> int:
    """Bytes of the scratch that the layers of a model share."""
    found = {m.scratch for m in model.modules() if isinstance(m, FrozenLinear)}
    return sum(scratch.nbytes for scratch in found)


def _step_bytes(laps: list[Lap], earlier: int) -> StepBytes:
    """The figures of a pass beside gradients of an earlier one."""
    names = [lap.mark[0] for lap in laps]
    hidden, loss = names.index("hidden states"), names.index("loss")
    return StepBytes(
        forward=earlier + max(lap.peak for lap in laps[: hidden + 1]),
        loss=earlier + max(lap.peak for lap in laps[hidden + 1 : loss + 1]),
        kept=earlier + laps[loss].end,
        backward=earlier + max(lap.peak for lap in laps[loss + 1 :]),
    )
