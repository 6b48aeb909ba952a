"""Parameters that hold the experts of a mixture, seen as modules of their own.

A module holds experts where transformers may compute with them in groups: one of its own mixtures
(they say whether their matrices are transposed, and how many experts there are), or one that
multiplies all of them at once. A 3-D Parameter of anything else is none: the kernel of a
convolution, the mixing weights of a recurrence.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from leanlift.layers import FrozenExperts, FrozenLinear, Workspace
from leanlift.weights.quantized import WeightFormat, frozen_weight, is_quantized
from leanlift.weights.stacks import (
    ExpertStack,
    QuantizedStack,
    StackWeight,
    quantized_stack,
    target_weight,
)

GROUPED = "grouped_mm"
"""How transformers calls computing with experts in groups."""


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, in its order, and after each its stacks of experts; without
    those inside layers of ours."""
    parts: dict[str, nn.Module] = {}
    inside = None
    for prefix, module in model.named_modules():
        if inside is None or not prefix.startswith(inside):
            parts |= {prefix: module, **dict(_stacks(prefix, module))}
            inside = f"{prefix}." if isinstance(module, FrozenLinear) else None
    return parts


def stack_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The stacks of experts of a model: their names, and [E, m, n]."""
    stacks: dict[str, Any] = {}
    for name, part in named_parts(model).items():
        if isinstance(part, ExpertStack):
            stacks[name] = part.weight
        elif isinstance(part, FrozenExperts):
            stacks[name] = part
    return {name: tuple(stack.shape) for name, stack in stacks.items()}


def quantize_experts(model: Any) -> Any:
    """Hold the experts of a model as its quantized Linears are held, in place.

    bitsandbytes quantizes Linears alone, so stock transformers loads experts in 16 bits. Here each
    stack is quantized by row tiles where it is, one stack at a time, and computed with by experts
    that have tokens. Call it before `get_lift_model` or `load_adapter`, as for the base that an
    adapter was trained over. `load_in_few_bits` has the same result, and never has a stack in 16
    bits.

    Args:
        model: as stock transformers loaded it, with bitsandbytes; one without experts, or without
            quantized Linears, stays as it is.

    Returns:
        The same model object.
    """
    parts, fmt = named_parts(model), format_of_linears(model)
    workspace = Workspace()
    for name in [name for name, part in parts.items() if isinstance(part, ExpertStack)]:
        weight = target_weight(parts.pop(name), name)
        if fmt is not None and isinstance(weight, StackWeight):
            put_frozen(model, name, quantized_stack(weight, weight.parts, fmt), workspace)
    return model


def format_of_linears(model: nn.Module) -> WeightFormat | None:
    """How the quantized Linears of a model are held, so its experts; None where it has none."""
    modules = model.named_modules()
    return next((frozen_weight(m, name).format for name, m in modules if is_quantized(m)), None)


def put_frozen(
    model: nn.Module, name: str, held: QuantizedStack, workspace: Workspace
) -> FrozenExperts:
    """Put quantized experts in the place of a stack, or where it was."""
    experts = FrozenExperts(held.module, held, workspace).train(model.training)
    put_part(model, name, experts)
    return experts


def _stacks(prefix: str, module: nn.Module) -> Iterator[tuple[str, ExpertStack]]:
    count = getattr(module, "num_experts", None)
    if not isinstance(count, int):
        return
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and parameter.shape[0] == count and _is_stack(module, key):
            yield f"{prefix}.{key}" if prefix else key, ExpertStack(parameter)


def _is_stack(module: nn.Module, key: str) -> bool:
    """Whether its module computes with this Parameter as with experts in groups."""
    if hasattr(module, "is_transposed") and hasattr(module, "_apply_gate"):
        return True
    kind: Any = type(module)
    return re.search(rf"\bbmm\(.*, self\.{re.escape(key)}\)", source_of(kind)) is not None


@functools.cache
def source_of(kind: Any) -> str:
    """The text of a class; empty where there is none, or where it is torch's own."""
    if kind.__module__.partition(".")[0] == "torch":
        return ""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""


def put_part(model: nn.Module, name: str, part: nn.Module) -> None:
    """Put a module in the place of another one or of a Parameter; a stack of experts becomes that
    Parameter again."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    new: Any = part.weight if isinstance(part, ExpertStack) else part
    there = getattr(owner, leaf, None)
    if there is not None and isinstance(there, nn.Module) != isinstance(new, nn.Module):
        delattr(owner, leaf)  # torch puts no module where a Parameter is, and none in its place
    setattr(owner, leaf, new)  # where a module was: a sequence goes through them in their order
    config: Any = getattr(owner, "config", None)
    if isinstance(part, FrozenExperts) and hasattr(config, "_experts_implementation"):
        config._experts_implementation = GROUPED
