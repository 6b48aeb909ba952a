"""Whether an adapter is one of a live model: what is compared before anything is changed."""

from __future__ import annotations

from typing import Any

from torch import nn

from leanlift.adapters import Adapter
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, other_matrix
from leanlift.fingerprint.samples import Comparison
from leanlift.model.base import checkpoint_of
from leanlift.model.resize_embeddings import embedding_size, head_name, rows_to_grow_to
from leanlift.model.state import LiftState
from leanlift.source import check_homes, stored_cells
from leanlift.weights.quantized import dtype_of


def configs_of(model: nn.Module) -> tuple[Any, Any]:
    """A model's configurations of its text part and of generation; None where it has none."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return text, getattr(model, "generation_config", None)


def check_checkpoint(adapter: Adapter, base: BaseFingerprint) -> None:
    """Compare an adapter with the checkpoint that a model was loaded from, where that is at hand:
    it tells more exactly than quantized weights can.

    Raises:
        UserError: it is of another base.
    """
    checkpoint, comparison = checkpoint_of(base), Comparison()
    if checkpoint is None:
        return
    check_homes(base, checkpoint)
    with stored_cells(checkpoint, dtype_of(base.dtype), base.layout) as stored:
        other = other_matrix(adapter.base, stored, comparison)
    if other or comparison.is_other:
        raise UserError(
            f"this adapter was trained on {adapter.base.name}; the loaded model ({base.name}) has "
            f"the same shapes but other weights{f' in {other}' if other else ''}: load the "
            "adapter's own base."
        )


def check_special(adapter: Adapter, model: nn.Module) -> None:
    """Refuse ids that the model has no embedding for: generation would pad with them."""
    size = getattr(configs_of(model)[0], "vocab_size", None)
    if adapter.grown is not None:
        size = adapter.grown.rows
    if isinstance(size, int) and adapter.special.largest >= size:
        raise UserError(
            f"{adapter.directory} says that it was trained with a special token "
            f"{adapter.special.largest}, but the model's vocabulary has {size}: the adapter is "
            "damaged."
        )


def check_rows(model: nn.Module, adapter: Adapter) -> None:
    """Refuse an adapter whose embedding has another number of rows than the model has, or can get.

    Rows beyond the adapter's would answer to tokens that it does not know.
    """
    grown, state = adapter.grown, getattr(model, "leanlift", None)
    if grown is not None and grown.head != head_name(model):
        raise UserError(
            f"{adapter.directory} says that the output head is {grown.head}, but the model's is "
            f"{head_name(model)}: the adapter is damaged."
        )
    if isinstance(state, LiftState) and state.embedding_rows is not None:
        check_same_rows(adapter, state)
    elif grown is not None:
        grown.check(embedding_size(model), str(adapter.directory))
        rows_to_grow_to(model, grown.rows)


def check_same_rows(adapter: Adapter, state: LiftState) -> None:
    """Refuse an adapter that was trained over an embedding of another number of rows."""
    wanted = None if adapter.grown is None else adapter.grown.rows
    if wanted != state.embedding_rows:
        one, two = (
            f"{rows} rows" if rows is not None else "the base's rows"
            for rows in (wanted, state.embedding_rows)
        )
        raise UserError(
            f"{adapter.directory} was trained with {one} in the embedding, but the model has "
            f"{two}: load the base again, and the adapter into it."
        )
