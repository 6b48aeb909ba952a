"""Making a `LiftModel` of a stock model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from leanlift.config import LiftConfig
from leanlift.lift_model.lift_model import LiftModel
from leanlift.model import lift, lifted
from leanlift.model import load_adapter as load_into


def get_lift_model(
    model: nn.Module,
    config: LiftConfig | None = None,
    progress: bool = True,
    calibration: Iterable[Mapping[str, Tensor]] | None = None,
    embedding_rows: int | None = None,
) -> LiftModel:
    """Select the principal weights of `model` and make them, and only them, trainable.

    Args:
        model: as stock transformers loaded it: `Linear4bit`, `Linear8bitLt` or plain Linears. It is
            changed in place. Attach before any forward pass (on a CPU, bitsandbytes repacks 4-bit
            weights in its own forward, which makes them unreadable).
        config: what to train; `LiftConfig()` if not given.
        progress: whether to show a bar over the layers.
        calibration: for `selector="gradient"`: batches with `input_ids` and `labels`, gone
            through several times.
        embedding_rows: how many rows the embedding and the head need, `len(tokenizer)` where
            tokens were added to it. Missing ones are made of the base's (`leanlift.weights.grown`),
            frozen, and come back wherever the adapter is loaded or merged.

    Returns:
        An adapter model, as PEFT has them, around the same model object.

    Raises:
        UserError: no target, a target that cannot be read, a budget that selects nothing, NaN
            weights, an embedding that cannot grow. The model is unchanged then.
    """
    return LiftModel(lift(model, config, progress, calibration, embedding_rows))


def load_adapter(model: nn.Module, source: str | Path, progress: bool = False) -> LiftModel:
    """Load an adapter into `model`, in place.

    A stock model gets its layers patched at the adapter's positions, without a new selection. On a
    model that leanlift has attached to already, the adapter takes the place of the present one,
    whatever modules and budgets either has: that is how to switch. Where a matrix trains as many
    entries as before, its Parameter object stays, so an optimizer that knows it goes on working.

    Args:
        model: the adapter's base, in the format that it was trained over.
        source: a directory or hub name; leanlift's own form or PEFT's SHiRA.
        progress: whether to show a bar over the matrices.

    Returns:
        An adapter model around the same model object; `model` itself, if it is one.

    Raises:
        UserError: a damaged adapter, or one of another base. The model is unchanged then.
    """
    load_into(lifted(model), source, progress)
    return model if isinstance(model, LiftModel) else LiftModel(model)
