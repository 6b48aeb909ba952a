"""What a run holds, added up from the rules of the rooms that own it: bytes from shapes alone.

No rule stands here. The bytes of a weight are `weights`' to say, those of an optimizer `optim`'s,
and so on; what is here says which of them a run has, and how often.
"""

from __future__ import annotations

from leanlift.export import merge_nbytes
from leanlift.model.attach import selecting_nbytes
from leanlift.model.refresh import refresh_nbytes
from leanlift.optim import optimizer_nbytes, update_nbytes
from leanlift.plan.shapes import Planned, Shapes
from leanlift.source import loading_nbytes
from leanlift.sparse import index_nbytes, retired_nbytes


def held_nbytes(planned: Planned, shapes: Shapes) -> dict[str, int]:
    """What stays from step to step, by category."""
    value, counts = planned.value_nbytes, shapes.counts
    return {
        "base weights": _base(planned, shapes),
        "embeddings and head": shapes.ends.held,
        "norms and other": shapes.other,
        "index": sum(index_nbytes(shapes.targets[name], count) for name, count in counts.items()),
        "values": value * sum(shapes.entries),
        "retired entries": _retired(planned, shapes),
        "optimizer state": optimizer_nbytes(planned.settings.optim, shapes.entries, value),
        "scratch": shapes.scratch,
    }


def _base(planned: Planned, shapes: Shapes) -> int:
    """The frozen weights; of a streamed base the buffers, and on a CPU, whose memory is the host's,
    what they are filled from."""
    streamed = shapes.streamed
    if streamed is None:
        return shapes.held
    host = 0 if planned.settings.on_cuda else streamed.host
    return shapes.held - streamed.tensors + streamed.buffers + host


def _retired(planned: Planned, shapes: Shapes) -> int:
    """The retired stores when they are full; without a bound, as large as the mask itself."""
    config, value = planned.config, planned.value_nbytes
    if not config.refresh_interval:
        return 0
    bounds = {name: config.retired_bound(count) for name, count in shapes.counts.items()
              if name in shapes.chosen}  # fmt: skip
    return sum(
        retired_nbytes(shapes.targets[name], shapes.counts[name] if bound is None else bound, value)
        for name, bound in bounds.items()
    )


def gradient_nbytes(planned: Planned, held: dict[str, int]) -> int:
    """Gradients that are there at once, beside a matrix's own while it is updated."""
    return 0 if planned.settings.optim_in_backward else held["values"]


def updating_nbytes(planned: Planned, shapes: Shapes, held: dict[str, int]) -> int:
    """Gradients and temporaries of the optimizer's step."""
    settings, value = planned.settings, planned.value_nbytes
    made = update_nbytes(settings.optim, shapes.entries, value, settings.on_cuda)
    return gradient_nbytes(planned, held) + made


def one_selection_nbytes(planned: Planned, shapes: Shapes) -> int:
    """What the largest selection before training takes."""
    item = planned.settings.model_dtype.itemsize
    return selecting_nbytes(planned.config, shapes.chosen, shapes.counts, item, shapes.parts)


def before_training(planned: Planned, shapes: Shapes, held: dict[str, int]) -> dict[str, int]:
    """Peaks of loading and of the first selection."""
    base = held["base weights"] + shapes.ends.loaded + shapes.other
    selecting = one_selection_nbytes(planned, shapes)
    item = planned.settings.model_dtype.itemsize
    return {
        "load": loading_nbytes(base, item * shapes.read_whole, shapes.by_tiles),
        "select": base + held["index"] + _attaching(held, shapes, selecting),
    }


def _attaching(held: dict[str, int], shapes: Shapes, selecting: int) -> int:
    """What comes beside a loaded base and the positions: a selection, then the ends in two forms,
    then the values, beside ends in INT8."""
    in_int8 = shapes.ends.held - shapes.ends.loaded if shapes.quantizing else 0
    return max(selecting, shapes.quantizing, held["values"] + in_int8)


def beside_training(
    planned: Planned, shapes: Shapes, static: int, evaluating: int
) -> dict[str, int]:
    """Peaks of an export, and of the evaluations and refreshes of a run that has them.

    Args:
        planned, shapes: of the run.
        static: bytes that stay.
        evaluating: bytes of an evaluation on top of them.
    """
    config, settings = planned.config, planned.settings
    unquantized = shapes.ends.loaded // settings.model_dtype.itemsize
    merging = merge_nbytes(max(shapes.largest, unquantized), shapes.turned)
    phases = {"export": merging if settings.on_cuda else static + merging}
    if settings.eval_batch is not None:
        phases["evaluate"] = static + evaluating
    if config.refresh_interval:
        phases["refresh"] = static + refresh_nbytes(
            config, shapes.chosen, shapes.counts, shapes.parts
        )
    return phases
