"""The weights of a model that nobody has loaded, held as loading it would hold them.

Which Linears transformers quantizes is asked of transformers: not the output head, not what shares
its weight with another one (Zamba2 goes through the same block several times), and of a checkpoint
that is quantized not what it says it skips, as those whose bits were chosen matrix by matrix.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from leanlift.model.stacks import named_parts
from leanlift.tiles import parts_of
from leanlift.weights.empty import another_empty, empty_weight
from leanlift.weights.kinds import is_dense_linear, is_turned_linear, matrix_of
from leanlift.weights.quantized import FrozenWeight, WeightFormat, frozen_weight
from leanlift.weights.stacks import ExpertStack, QuantizedStack, target_weight


def planned_weights(
    model: Any, fmt: WeightFormat, targets: list[str], skipped: Collection[str] | None = None
) -> dict[str, FrozenWeight]:
    """Weights without numbers, of the Linears of a fake 16/32-bit model that loading quantizes, or
    of its targets where it does not; and of the stacks of experts among these.

    Args:
        model: as transformers makes it of its configuration.
        fmt: how Linears other than the output head are held.
        targets: names of what needs a weight in any case.
        skipped: names of what a quantized checkpoint says it skips; None: it says nothing.
    """
    head, trained = model.get_output_embeddings(), set(targets)
    dense = _left_alone(model, skipped)
    weights: dict[str, FrozenWeight] = {}
    empty: dict[tuple[int, int], FrozenWeight] = {}
    for name, module in named_parts(model).items():
        if isinstance(module, ExpertStack) and (fmt.kind != "dense" or name in trained):
            weights[name] = _planned_stack(module, name, fmt)
        if not is_dense_linear(module) or (module is head and name not in trained):
            continue
        # transformers quantizes no other
        quantized = type(module) is nn.Linear or is_turned_linear(module)
        if fmt.kind != "dense" and quantized and module is not head and name not in dense:
            m, n = matrix_of(module).shape
            bias: Any = module.bias
            if (m, n) not in empty:
                empty[m, n] = empty_weight((m, n), fmt)
            weights[name] = another_empty(empty[m, n], bias)
        elif name in trained:
            weights[name] = frozen_weight(module, name)
    return weights


def _left_alone(model: Any, skipped: Collection[str] | None) -> set[str]:
    """The modules that transformers leaves as they are where it quantizes the others."""
    told = None if skipped is None else [*skipped]
    keeps = getattr(model, "_keep_in_fp32_modules", None)
    patterns = HfQuantizer.get_modules_to_not_convert(model, told, keeps)
    names = (name for name, _ in model.named_modules())
    return {name for name in names if not should_convert_module(name, patterns)}


def _planned_stack(module: ExpertStack, name: str, fmt: WeightFormat) -> FrozenWeight:
    """Experts as they are held beside Linears in this format."""
    weight = target_weight(module, name)
    if fmt.kind == "dense":
        return weight
    return QuantizedStack(empty_weight(weight.shape, fmt), parts_of(weight), weight.dtype)
