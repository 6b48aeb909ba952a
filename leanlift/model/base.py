"""The base under a model that is attached to: whether it can be, what it is, whose it is then."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from leanlift.errors import UserError
from leanlift.fingerprint import (
    BaseFingerprint,
    Layout,
    Segment,
    fingerprint,
    other_matrix,
    with_samples,
)
from leanlift.fingerprint.cells import Cells, cells_of
from leanlift.fingerprint.samples import Comparison
from leanlift.io.hub import snapshot_of
from leanlift.layers import FrozenLinear, LiftEmbedding
from leanlift.model.blocks import inside_blocks
from leanlift.model.stacks import named_parts, stack_shapes
from leanlift.model.state import LiftState
from leanlift.model.surgery import outer_modules
from leanlift.source import find, layout_in, open_checkpoint, plain_view, stored_cells
from leanlift.sparse import SegmentedIndex
from leanlift.tiles import parts_of_stacks
from leanlift.weights.kinds import is_stored_turned
from leanlift.weights.places import weight_tensors
from leanlift.weights.quantized import (
    FrozenWeight,
    WeightFormat,
    dtype_of,
    is_quantized,
)
from leanlift.weights.stacks import target_weight


@dataclass(frozen=True)
class LiveBase:
    """What is under the layers of a model, read once for an attach or a load.

    Attributes:
        weights: by module, of the targets, then of all else that is quantized or has a layer of
            ours.
        facts: the fingerprint; its `shapes` name the targets, in model order.
    """

    weights: dict[str, FrozenWeight]
    facts: BaseFingerprint

    def cells(self, name: str, flat: Tensor) -> Cells:
        """Cells of a target at flat positions, as `with_samples` reads them."""
        return cells_of(self.weights[name], flat, dtype_of(self.facts.dtype))

    def sampled(self) -> BaseFingerprint:
        """The fingerprint with samples of the targets, for an adapter that says nothing of its
        base."""
        none = partial(torch.empty, 0, dtype=torch.int64)
        return with_samples(self.facts, dict.fromkeys(self.facts.stored, none), self.cells)


def live_base(model: nn.Module, wanted: Collection[str], whole: Collection[str] = ()) -> LiveBase:
    """The base of a model, stock or attached, with those of the wanted targets that it has in its
    blocks.

    Args:
        model: whose base it is.
        wanted: names of targets.
        whole: names of Linears that may lie outside the blocks.

    Raises:
        UserError: one that cannot be read, or, of a stock model, weights that are not numbers.
    """
    modules = dict(outer_modules(model))
    modules = {name: m for name, m in modules.items() if not isinstance(m, LiftEmbedding)}
    inside = inside_blocks(named_parts(model))
    targets = [name for name in dict.fromkeys((*inside, *whole))
               if name in wanted and name in modules]  # fmt: skip
    state = getattr(model, "leanlift", None)
    if not isinstance(state, LiftState):
        return stock_base(model, targets)
    layers = [name for name, module in modules.items() if isinstance(module, FrozenLinear)]
    weights = {name: _weight(modules[name], name) for name in dict.fromkeys((*targets, *layers))}
    facts = replace(
        state.base,
        shapes={name: weights[name].shape for name in targets},
        formats=_formats({name: weights[name].format for name in targets}, layers, state),
        parts=parts_of_stacks(weights, targets),
    )
    return LiveBase(weights, facts)


def stock_base(model: nn.Module, targets: list[str]) -> LiveBase:
    """The base of a stock model.

    Raises:
        UserError: a weight that cannot be read, or weights that are not numbers.
    """
    modules, trained = named_parts(model), set(targets)
    others = [
        name
        for name, module in modules.items()
        if name not in trained and (is_quantized(module) or isinstance(module, FrozenLinear))
    ]
    weights = {name: _weight(modules[name], name) for name in (*targets, *others)}
    check_finite(model)
    name, dtype, revision = base_name(model), base_dtype(model), base_revision(model)
    facts = fingerprint(model, weights, targets, name, dtype, revision)
    facts = replace(facts, layout=_layout(model, weights, facts))
    outside = set(targets) - set(inside_blocks(modules))
    return LiveBase(weights, replace(facts, new=_without_home(facts, outside)))


def _without_home(facts: BaseFingerprint, names: Collection[str]) -> tuple[str, ...]:
    """Of matrices outside the blocks, those that the checkpoint has not, where it is at hand."""
    checkpoint = checkpoint_of(facts)
    if not names or checkpoint is None:
        return ()
    with open_checkpoint(checkpoint) as files:
        tensors = plain_view(files)
        return tuple(n for n in names if find(f"{n}.weight", tensors, facts.layout) is None)


def _layout(
    model: nn.Module, weights: Mapping[str, FrozenWeight], facts: BaseFingerprint
) -> Layout:
    """Where the tensors of a stock model are in its checkpoint: if that is not at hand, under their
    own names, and turned where they are kept so."""
    checkpoint, modules = checkpoint_of(facts), named_parts(model)
    held = {n: m.base if isinstance(m, FrozenLinear) else m for n, m in modules.items()}
    turned = {f"{n}.weight": w.shape for n, w in weights.items() if is_stored_turned(held[n])}
    if checkpoint is None:
        homes = {name: (Segment(name, 0, m, turned=True),) for name, (m, _) in turned.items()}
        return Layout(homes=homes)
    live = {key: tuple(tensor.shape) for key, tensor in model.state_dict(keep_vars=True).items()}
    stacks = stack_shapes(model)
    live |= {f"{n}.weight": weight.shape for n, weight in weights.items() if n not in stacks}
    layout = layout_in(model, checkpoint, live, stacks, turned)
    tied = _stored_twins(model, facts.sampled, checkpoint, layout)
    return replace(layout, names={**layout.names, **tied})


def _stored_twins(
    model: nn.Module, sampled: Collection[str], checkpoint: Path, layout: Layout
) -> dict[str, str]:
    """Of sampled tensors that a checkpoint does not have, what they are tied to and it has."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    twins = {name: all_ for all_ in names.values() for name in all_ if name in sampled}
    with open_checkpoint(checkpoint) as files:
        tensors = plain_view(files)
        lacking = [name for name in sampled if find(name, tensors, layout) is None]
        found = [(name, find(t, tensors, layout)) for name in lacking for t in twins[name]]
        return {name: stored.name for name, stored in found if stored is not None}


def _formats(
    targets: Mapping[str, WeightFormat], layers: list[str], state: LiftState
) -> dict[str, WeightFormat]:
    """The formats of these targets and of all that is quantized, in the order in which they are
    found on a stock model: targets, the other Linears, embedding and head."""
    quantized = {name: fmt for name, fmt in state.base.formats.items() if fmt.kind != "dense"}
    order = dict.fromkeys((*targets, *layers, *quantized))
    return {name: targets.get(name) or quantized[name] for name in order
            if name in targets or name in quantized}  # fmt: skip


def _weight(module: nn.Module, name: str) -> FrozenWeight:
    """The frozen weight of a Linear, or under a layer of ours."""
    if isinstance(module, FrozenLinear):
        return cast(FrozenWeight, module.weight_tiles)
    return target_weight(module, name)


def check_attachable(model: nn.Module, whole: Collection[str] = ()) -> None:
    """Refuse what is attached to already, what another library has patched, and what is no causal
    language model.

    Args:
        model: a stock model.
        whole: names of what is trained whole; a head of another kind may be among them.

    Raises:
        UserError: says what it is.
    """
    if hasattr(model, "leanlift"):
        raise UserError(
            "this model has leanlift layers already: load the base again to start over."
        )
    places = sorted(
        {str(place) for place in (getattr(model, "hf_device_map", None) or {}).values()}
    )
    if len(places) > 1:
        raise UserError(
            f"this base is spread over {', '.join(places)} (device_map), and leanlift trains a "
            'model on one device: load it with device_map={"": 0}, and for several GPUs start a '
            "process for each with accelerate launch --multi_gpu."
        )
    for name, module in model.named_modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise UserError(
                f"this model holds layers of PEFT ({name or 'the model itself'} is a "
                f"{type(module).__name__}): merge its adapter and load the result, or load the "
                "base without it."
            )
    ends = getattr(model, "get_output_embeddings", None)
    if ends is not None and ends() is None and not whole:
        raise UserError(
            f"this {type(model).__name__} has no output head over its vocabulary, so it is no "
            "causal language model; what stands there instead would be neither trained nor saved: "
            "load it with AutoModelForCausalLM, or name it in modules_to_save (score)."
        )


def check_checkpointing(model: Any) -> None:
    """Refuse activation checkpointing of a model that has no blocks for it.

    Raises:
        UserError: says how to go without.
    """
    if not getattr(model, "supports_gradient_checkpointing", True):
        raise UserError(
            f"this {type(model).__name__} has no activation checkpointing: set "
            "gradient_checkpointing=false, which takes more memory."
        )


def without_input_gradients(model: Any) -> None:
    """Take back that embeddings give what requires a gradient, which transformers does where it
    enables checkpointing: blocks need none of their input, and a frozen tower would be gone through
    backwards for it.
    """
    for part in model.modules():
        if getattr(part, "_require_grads_hooks", None):
            part.disable_input_require_grads()


@torch.no_grad()
def check_finite(model: nn.Module) -> None:
    """Refuse weights that are not numbers, in whatever part of a model: norms, embedding, head and
    biases as well as matrices; of a quantized one, which can be read, its scales say so.

    Raises:
        UserError: NaN or infinite ones; names the tensor.
    """
    for name, module in model.named_modules():
        held = list(module.named_parameters(recurse=False))
        if is_quantized(module):
            held = [(key, tensor) for key, tensor in held if key != "weight"]
            held += [("weight", tensor) for tensor in weight_tensors(module)]
        for key, tensor in held:
            bad = not_finite(tensor)
            if bad:
                small = base_dtype(model) == torch.float16
                raise UserError(
                    f"{name}.{key} has {bad} NaN or infinite weights of {tensor.numel()}: "
                    + (
                        "they may be too large for float16, so load the base in bfloat16 or "
                        "float32; or "
                        if small
                        else ""
                    )
                    + "the base is damaged, so fetch it again."
                )


def not_finite(tensor: Tensor) -> int:
    """How many NaN or infinite numbers a tensor has. Its ends show whether there are some, and to
    look at these takes no memory."""
    if not tensor.is_floating_point() or tensor.device.type == "meta" or not tensor.numel():
        return 0
    if all(math.isfinite(end) for end in torch.aminmax(tensor.detach())):
        return 0
    return int((~torch.isfinite(tensor)).sum())


def base_name(model: nn.Module) -> str:
    """Where a model was loaded from."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def base_revision(model: nn.Module) -> str | None:
    """The commit that a model was loaded from, where it is known."""
    found = getattr(getattr(model, "config", None), "_commit_hash", None)
    return found if isinstance(found, str) and re.fullmatch(r"[0-9a-f]{40}", found) else None


def base_dtype(model: nn.Module) -> torch.dtype:
    """The dtype the model was loaded in."""
    dtype = getattr(model, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next(p.dtype for p in model.parameters() if p.dtype.is_floating_point)


def checkpoint_of(base: BaseFingerprint) -> Path | None:
    """Where the checkpoint of a base lies on this machine; None where it is not at hand."""
    found = snapshot_of(base.name, base.revision)
    return found if found is not None and (found / "config.json").is_file() else None


def with_base_samples(
    base: LiveBase, indices: Mapping[str, SegmentedIndex], checkpoint: Path | None
) -> BaseFingerprint:
    """The fingerprint with samples of its targets, which train `indices`: of the checkpoint, which
    has them exactly, where it is at hand, else of what is in memory.

    Raises:
        UserError: the checkpoint has other weights than the model.
    """
    none = partial(torch.empty, 0, dtype=torch.int64)
    masks = {  # 8 bytes an entry: one by one
        name: none if index.is_full else index.to_flat
        for name, index in indices.items()
        if name not in base.facts.new
    }
    if checkpoint is None:
        return with_samples(base.facts, masks, base.cells)
    dtype, layout = dtype_of(base.facts.dtype), base.facts.layout
    with stored_cells(checkpoint, dtype, layout) as stored:
        exact = with_samples(base.facts, masks, stored)
    comparison = Comparison()
    other = other_matrix(exact, base.cells, comparison)
    if other or comparison.is_other:
        raise UserError(
            f"the model has other weights than {checkpoint}, from which it was loaded"
            f"{f', in {other}' if other else ''}: an adapter of it could not be merged. Save the "
            "model as it is with save_pretrained, and load that."
        )
    return exact
