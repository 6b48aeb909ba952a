"""What is between products, in less memory or less time: long rows in pieces, fused kernels."""

from __future__ import annotations

from torch import nn

from leanlift.errors import UserError
from leanlift.layers.fused_elementwise import fused_kernel_glu, use_fused_elementwise
from leanlift.layers.fused_glu import fused_glu
from leanlift.layers.tiled_mlp import use_tiled_mlp
from leanlift.layers.tiled_norms import use_tiled_norms
from leanlift.model.state import lifted


def tiled_mlp(model: nn.Module, tokens: int | None = None, fused: bool = False) -> list[str]:
    """Let the MLPs and norms of an attached model go over the tokens of long rows in pieces, in
    place; see `leanlift.layers.tiled_mlp` and `tiled_norms`.

    Args:
        model: attached.
        tokens: of a piece of an MLP's, at most; None: as `layers.tiled_mlp.pieces` has it.
        fused: whether gated products are computed by Liger's kernels, as after `fused_elementwise`.

    Returns:
        The names of the MLPs.

    Raises:
        UserError: it has no MLP that could.
    """
    found = use_tiled_mlp(lifted(model), tokens, fused_kernel_glu if fused else fused_glu)
    use_tiled_norms(lifted(model))
    return found


def fused_elementwise(model: nn.Module) -> dict[str, int]:
    """Let an attached model compute norms, rotary embeddings and gated products by Liger's kernels,
    in place; see `leanlift.layers.fused_elementwise`. Before `tiled_mlp`, which leaves these norms
    as they are.

    Returns:
        How many there are of each: "norms", "rotary", "mlps"; 0: none is of a form that a kernel
        computes.
    """
    return use_fused_elementwise(lifted(model))


def between_products(model: nn.Module, tiled: bool, tokens: int | None, fused: bool) -> list[str]:
    """`fused_elementwise` and `tiled_mlp` as the settings of a run have them.

    Returns:
        The names of the MLPs that go in pieces.
    """
    if fused:
        fused_elementwise(model)
    return tiled_mlp(model, tokens, fused) if tiled else []


def check_fused(model: nn.Module) -> None:
    """Refuse `fused_elementwise` where it would do nothing.

    Raises:
        UserError: no part of the model is of a form that a kernel computes.
    """
    if not any(fused_elementwise(model).values()):
        kind = type(lifted(model)).__name__
        raise UserError(
            f"no norm, rotary embedding or gated MLP of this {kind} is of a form that Liger's "
            "kernels compute: leave out fused_elementwise."
        )
