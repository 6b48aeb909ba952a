"""Weights as bitsandbytes is asked to hold them, and as its checkpoints do: the parts of each, and
what they make."""

from __future__ import annotations

from torch import Tensor

from leanlift.errors import UserError
from leanlift.weights import bnb
from leanlift.weights.quantized import FrozenWeight, Weight4bit, Weight8bit, WeightFormat

STORED_STATE = bnb.STATE_4BIT
STORED_PARTS = bnb.PARTS_4BIT
"""How a bitsandbytes checkpoint calls the parts of a 4-bit weight, after its name and a dot."""


def stored_shape(state: Tensor) -> tuple[int, int]:
    """The shape of a 4-bit weight of a checkpoint, from the part that describes it.

    Raises:
        ValueError: it describes no matrix.
    """
    shape = bnb.describe_4bit(state).get("shape")
    if not (isinstance(shape, list) and len(shape) == 2 and all(type(s) is int for s in shape)):
        raise ValueError(f"expected two sizes, got {shape!r:.80}")
    return shape[0], shape[1]


def stored_weight(weight: Tensor, parts: dict[str, Tensor]) -> FrozenWeight:
    """A weight as a bitsandbytes checkpoint holds it.

    Args:
        weight: packed 4-bit codes, or INT8 ones [m, n].
        parts: of a 4-bit weight by their `STORED_PARTS` names; of an INT8 one, "SCB" [m].
    """
    if "SCB" in parts:
        return Weight8bit(bnb.stored_8bit(weight, parts["SCB"]))
    return Weight4bit(bnb.stored_4bit(weight, parts))


def requested_format(
    load_in_4bit: bool, load_in_8bit: bool, quant_type: str, double: bool, dtype: str
) -> WeightFormat:
    """How bitsandbytes holds a Linear that is loaded under these settings of its configuration.

    Args:
        load_in_4bit, load_in_8bit: what is asked for; 8 bits where both are.
        quant_type: of 4 bits, "nf4" or "fp4".
        double: whether 4-bit weights have their scales quantized.
        dtype: name of the dtype that a weight has before it is quantized.

    Raises:
        UserError: another type of 4-bit weights.
    """
    if load_in_8bit:
        return WeightFormat("int8", "float32")
    if not load_in_4bit:
        return WeightFormat("dense", dtype)
    if quant_type not in ("nf4", "fp4"):
        raise UserError(f"expected bnb_4bit_quant_type nf4 or fp4, got {quant_type!r}.")
    return WeightFormat(quant_type, dtype, 64, double)
