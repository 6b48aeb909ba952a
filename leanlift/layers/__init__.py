"""The patched layer: y = x (D(Q) + offsets)^T + bias, with gradients for the offsets alone.

What is kept for the backward pass is x and nothing dense. The work is split over two autograd
functions, so that activation checkpointing can stop recomputing as soon as it has x back and
never repeats a matmul whose output nobody needs:

    carrier = KeepInput(x, values, …)   keeps x; in backward forms the gradient of the values
    y       = Multiply(x, carrier)      keeps nothing; in backward forms the gradient of x

`carrier` is the thread between them: an expanded scalar of y's shape, without memory of its own.
Its "gradient" is grad_y, which is how KeepInput gets to see it. Where x was made of what is kept
anyway, by a frozen norm or in a gated MLP, not even x is kept (`leanlift.layers.made_again`).

Both directions need the effective weight. It is rebuilt each time, in a scratch buffer that all
layers of a model share; on a CPU, where a 4-bit weight is dequantized into a new tensor, in that.
The values' gradient is formed by row tiles of grad_y^T @ x, of which only the selected entries are
kept, and on a CPU only they are formed: no dense weight gradient of more than one tile ever exists.

The experts of a mixture (`leanlift.layers.experts`) are a stack of such weights in one layer, made
one at a time.

Shapes: x [..., n], y [..., m], W [m, n], k entries, T = product of the leading dimensions.
"""

from leanlift.layers.effective import EffectiveTiles
from leanlift.layers.experts import FrozenExperts, LiftExperts
from leanlift.layers.frozen import (
    FrozenLinear,
    largest_in_scratch,
    patched_rows,
    scratch_nbytes,
)
from leanlift.layers.lift import LiftLinear
from leanlift.layers.tokens import LiftEmbedding, TiedHead
from leanlift.layers.workspace import Scratch, Workspace

__all__ = [
    "EffectiveTiles",
    "FrozenExperts",
    "FrozenLinear",
    "LiftEmbedding",
    "LiftExperts",
    "LiftLinear",
    "Scratch",
    "TiedHead",
    "Workspace",
    "largest_in_scratch",
    "patched_rows",
    "scratch_nbytes",
]
