"""Long rows in pieces: a model whose MLPs and norms go over their tokens so."""

from __future__ import annotations

from torch import nn

from leanlift.layers.tiled_mlp import use_tiled_mlp
from leanlift.layers.tiled_norms import use_tiled_norms
from leanlift.model.state import lifted


def tiled_mlp(model: nn.Module, tokens: int | None = None) -> list[str]:
    """Let the MLPs and norms of an attached model go over the tokens of long rows in pieces, in
    place; see `leanlift.layers.tiled_mlp` and `tiled_norms`.

    Args:
        model: attached.
        tokens: of a piece of an MLP's, at most; None: as `layers.tiled_mlp.pieces` has it.

    Returns:
        The names of the MLPs.

    Raises:
        UserError: it has no MLP that could.
    """
    found = use_tiled_mlp(lifted(model), tokens)
    use_tiled_norms(lifted(model))
    return found
