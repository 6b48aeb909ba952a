"""Tokens whose rows of the embedding are trained; the rest of it is frozen.

A row of an embedding is a row of a matrix: the offsets of some whole rows are kept, saved and added
as those of a Linear's entries are. Rows are looked up in the embedding as it was, and a trained one
gets its offset; nothing as large as the embedding is made. Where the output head is tied to the
embedding, the logits of these tokens follow.

Shapes: t trained tokens, V rows, d width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from leanlift.layers.lift import LiftLinear
from leanlift.layers.untraced import untraced
from leanlift.layers.workspace import Workspace
from leanlift.sparse import LayerOffsets, SegmentedIndex
from leanlift.tiles import RowTiles

TOKEN_NBYTES = 8
"""Of a trained token, beside its row."""


class LiftEmbedding(LiftLinear):
    """A frozen embedding with trainable offsets for the rows of some tokens.

    Args:
        lookup: the embedding as it was: `[..., d]` for ids.
        gather: rows of its weight `[t, d]` by ids, as exactly as they are held.
        base, weight, workspace, values_dtype: as for `LiftLinear`; `base` holds the weight.
        index: all positions of the tokens' rows.
        tokens: sorted ids, int64 [t].
        scale_by: scalar that rows are multiplied by after they are looked up, as Gemma does.
    """

    tokens: Tensor

    def __init__(
        self,
        lookup: nn.Module,
        gather: Callable[[Tensor], Tensor],
        base: nn.Module,
        weight: RowTiles,
        index: SegmentedIndex,
        workspace: Workspace,
        tokens: Tensor,
        scale_by: Tensor | None = None,
        values_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(base, weight, index, workspace, values_dtype)
        self.lookup = lookup
        self.gather = gather
        self.register_buffer("tokens", tokens, persistent=False)
        self.register_buffer("scale_by", scale_by, persistent=False)

    @untraced
    def forward(self, ids: Tensor) -> Tensor:
        """[..., d] for ids [...]."""
        found: Tensor = self.lookup(ids)
        if self.is_plain:
            return found
        place = torch.searchsorted(self.tokens, ids).clamp_(max=len(self.tokens) - 1)
        trained = (self.tokens[place] == ids).unsqueeze(-1)
        return torch.where(trained, F.embedding(place, self._looked_up(found.dtype)), found)

    @property
    def is_plain(self) -> bool:
        """Whether all rows are the base's: this thread computes as without an adapter, or the
        adapter has nothing here."""
        return self.is_off or not self.index.count

    def token_rows(self, dtype: torch.dtype) -> Tensor:
        """The trained rows [t, d]: the base's and their offsets, added in fp32 and rounded once."""
        base = self.gather(self.tokens).to(torch.float32)
        offsets = self.values.view_as(base).to(torch.float32)
        return (base + (offsets if self.scale == 1 else offsets * self.scale)).to(dtype)

    def _looked_up(self, dtype: torch.dtype) -> Tensor:
        scale: Any = self.scale_by
        rows = self.token_rows(dtype)
        return rows if scale is None else rows * scale.to(dtype)

    @property
    def weight(self) -> Tensor:
        """The weight as the embedding holds it."""
        weight: Tensor = self.lookup.weight  # type: ignore[assignment]
        return weight

    @property
    def is_fixed(self) -> bool:
        """The tokens stay those that were named."""
        return True

    def needs_scratch(self, dtype: torch.dtype) -> bool:
        """Never: no dense weight is made."""
        return False

    def put(self, learned: LayerOffsets) -> None:
        """As `LiftLinear.put`, of the same tokens' rows.

        Raises:
            ValueError: of others.
        """
        own, given = self.index, learned.active.index
        same = torch.equal(own.counts.cpu(), given.counts.cpu())
        if not same or learned.retired is not None:
            raise ValueError("expected the rows of the tokens that are trained")
        super().put(learned)


class TiedHead(nn.Module):
    """An output head that is tied to an embedding of which some tokens are trained.

    Args:
        frozen: the head as it was.
        embedding: what it is tied to; no submodule here.
    """

    def __init__(self, frozen: nn.Module, embedding: LiftEmbedding) -> None:
        super().__init__()
        self.frozen = frozen
        self.__dict__["embedding"] = embedding

    @property
    def weight(self) -> Tensor:
        """The weight [V, d], with the trained rows in their places and a gradient to them: some
        losses multiply with it themselves."""
        weight: Tensor = self.frozen.weight  # type: ignore[assignment]
        embedding: LiftEmbedding = self.__dict__["embedding"]
        if embedding.is_plain:
            return weight
        return weight.index_copy(0, embedding.tokens, embedding.token_rows(weight.dtype))

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        bias: Any = getattr(self.frozen, "bias", None)
        return bias  # type: ignore[no-any-return]

    @untraced
    def forward(self, x: Tensor) -> Tensor:
        """Logits [..., V]."""
        embedding: LiftEmbedding = self.__dict__["embedding"]
        logits: Tensor = self.frozen(x)
        if embedding.is_plain:
            return logits
        bias = None if self.bias is None else self.bias[embedding.tokens].to(logits.dtype)
        rows = embedding.token_rows(logits.dtype)
        trained = F.linear(x.to(logits.dtype), rows, bias)
        return logits.index_copy(-1, embedding.tokens, trained)


def rows_index(tokens: Tensor, shape: tuple[int, int]) -> SegmentedIndex:
    """All positions of some rows of a matrix; `tokens` sorted, int64 [t]."""
    columns = torch.arange(shape[1], device=tokens.device)
    return SegmentedIndex.from_flat((tokens[:, None] * shape[1] + columns).reshape(-1), shape)
