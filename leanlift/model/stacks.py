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

from leanlift.layers.experts import FrozenExperts
from leanlift.weights.stacks import ExpertStack

GROUPED = "grouped_mm"
"""How transformers calls computing with experts in groups."""


def named_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by name, in its order, and after each its stacks of experts."""
    return {
        name: part
        for prefix, module in model.named_modules()
        for name, part in ((prefix, module), *_stacks(prefix, module))
    }


def stack_names(model: nn.Module) -> list[str]:
    """The Parameters of a model that are stacks of experts."""
    return [name for name, part in named_parts(model).items() if isinstance(part, ExpertStack)]


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
    if hasattr(owner, leaf):
        delattr(owner, leaf)  # torch puts no module where a Parameter is
    setattr(owner, leaf, part.weight if isinstance(part, ExpertStack) else part)
    config: Any = getattr(owner, "config", None)
    if isinstance(part, FrozenExperts) and hasattr(config, "_experts_implementation"):
        config._experts_implementation = GROUPED
