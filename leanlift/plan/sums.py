"""What a run holds, added up from the rules of the rooms that own it: bytes from shapes alone.

No rule stands here. The bytes of a weight are `weights`' to say, those of an optimizer `optim`'s,
and so on; what is here says which of them a run has, and how often.
"""

from __future__ import annotations

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.export import merge_nbytes
from leanlift.model.attach import selecting_nbytes
from leanlift.model.refresh import refresh_nbytes
from leanlift.optim import moment_sizes, optimizer_nbytes, update_nbytes
from leanlift.plan.blas import THREADS, workspace_here
from leanlift.plan.shapes import Planned, Shapes
from leanlift.source import loading_nbytes
from leanlift.sparse import anchors_nbytes, index_nbytes, index_sizes, retired_nbytes
from leanlift.streaming import BUFFERS, nbytes_of


def held_nbytes(planned: Planned, shapes: Shapes) -> dict[str, int]:
    """What stays from step to step, by category."""
    elsewhere = brought(planned, shapes)
    here = {name: count for name, count in shapes.counts.items() if name not in elsewhere}
    anchors = sum(anchors_nbytes(shapes.targets[name][0]) for name in elsewhere)
    state = _state_blocks(planned, shapes)
    host = 0 if planned.settings.on_cuda else sum(state)
    return {
        "base weights": _base(planned, shapes),
        "embeddings and head": shapes.ends.held,
        "norms and other": shapes.other,
        "index": anchors + _index(shapes, here),
        "values": planned.value_nbytes * sum(here.values()),
        "retired entries": _retired(planned, shapes, here),
        "optimizer state": moments_nbytes(planned, shapes) - _brought_moments(planned, shapes),
        **({"streamed state": BUFFERS * max(state) + host} if state else {}),
        "scratch": shapes.scratch,
    }


def blas_nbytes(planned: Planned, threads: int = THREADS) -> int:
    """What so many threads multiply in, on a card."""
    return threads * workspace_here() if planned.settings.on_cuda else 0


def adapter_nbytes(planned: Planned, shapes: Shapes) -> int:
    """Positions, offsets and retired entries, wherever they are."""
    values = planned.value_nbytes * sum(shapes.entries)
    return _index(shapes, shapes.counts) + values + _retired(planned, shapes, shapes.counts)


def moments_nbytes(planned: Planned, shapes: Shapes) -> int:
    """The optimizer's state, wherever it is."""
    return optimizer_nbytes(planned.settings.optim, shapes.entries, planned.value_nbytes)


def host_nbytes(planned: Planned, shapes: Shapes) -> int:
    """What is streamed, in the host's memory."""
    base = 0 if shapes.streamed is None else shapes.streamed.host
    return base + sum(_state_blocks(planned, shapes))


def brought(planned: Planned, shapes: Shapes) -> frozenset[str]:
    """The targets whose state comes with their blocks.

    Raises:
        UserError: it cannot, as a model goes through a block several times.
    """
    if not planned.settings.stream_state or shapes.streamed is None:
        return frozenset()
    if shapes.streamed.again is not None:
        raise UserError(shapes.streamed.again)
    return frozenset(name for block in shapes.streamed.targets for name in block)


def _state_blocks(planned: Planned, shapes: Shapes) -> list[int]:
    """Bytes of the state of each block, laid out, where it comes with it."""
    if not brought(planned, shapes) or shapes.streamed is None:
        return []
    blocks = ([s for n in block for s in _state_sizes(planned, shapes, n)]
              for block in shapes.streamed.targets if block)  # fmt: skip
    return list(map(nbytes_of, blocks))


def _state_sizes(planned: Planned, shapes: Shapes, name: str) -> list[int]:
    """Bytes of the tensors that a target has in its block's state, its retired store full."""
    shape, count, value = shapes.targets[name], shapes.counts[name], planned.value_nbytes
    sizes = [
        *index_sizes(shape, count),
        value * count,
        *([value * count] if planned.settings.accumulates else []),  # the sum of gradients so far
        *moment_sizes(planned.settings.optim, count),
    ]
    bound = _bound(planned.config, shapes, name)
    return [*sizes, *index_sizes(shape, bound), value * bound] if bound else sizes


def _brought_moments(planned: Planned, shapes: Shapes) -> int:
    optim, counts = planned.settings.optim, shapes.counts
    names = brought(planned, shapes)
    return sum(size for name in names for size in moment_sizes(optim, counts[name]))


def _index(shapes: Shapes, counts: dict[str, int]) -> int:
    return sum(index_nbytes(shapes.targets[name], count) for name, count in counts.items())


def _base(planned: Planned, shapes: Shapes) -> int:
    """The frozen weights; of a streamed base the buffers, and on a CPU, whose memory is the host's,
    what they are filled from."""
    streamed = shapes.streamed
    if streamed is None:
        return shapes.held
    host = 0 if planned.settings.on_cuda else streamed.host
    return shapes.held - streamed.tensors + streamed.buffers + host


def _retired(planned: Planned, shapes: Shapes, counts: dict[str, int]) -> int:
    """The retired stores of some targets when they are full."""
    bounds = {name: _bound(planned.config, shapes, name) for name in counts}
    value = planned.value_nbytes
    return sum(retired_nbytes(shapes.targets[name], bounds[name], value) for name in counts)


def _bound(config: LiftConfig, shapes: Shapes, name: str) -> int:
    """Entries of a target's retired store when it is full: without a bound, all that it trains."""
    if not config.refresh_interval or name not in shapes.chosen:
        return 0
    bound = config.retired_bound(shapes.counts[name])
    return shapes.counts[name] if bound is None else bound


def gradient_nbytes(planned: Planned, held: dict[str, int]) -> int:
    """Gradients that are there at once, beside a matrix's own while it is updated."""
    settings = planned.settings
    return held["values"] if settings.accumulates or not settings.optim_in_backward else 0


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
    ends = _ends_on_device(planned, shapes)
    base = held["base weights"] + ends + shapes.other
    item = planned.settings.model_dtype.itemsize
    chosen = [sum(index_sizes(shapes.targets[name], shapes.counts[name]))
              for name in brought(planned, shapes)]  # fmt: skip
    at_once = max if planned.settings.on_cuda else sum  # on a CPU the host's memory is its own
    index = held["index"] + (at_once(chosen) if chosen else 0)
    multiplied = blas_nbytes(planned, 1 if planned.config.selector != "gradient" else THREADS)
    return {
        "load": loading_nbytes(base, item * shapes.read_whole, shapes.by_tiles),
        "select": base + index + multiplied + _attaching(planned, held, shapes, ends),
    }


def _ends_on_device(planned: Planned, shapes: Shapes) -> int:
    """The embedding and the head while entries are chosen: those of a streamed base that get
    another form wait on the host, where a card computes."""
    settings, ends = planned.settings, shapes.ends
    if not (settings.on_cuda and settings.stream_base) or planned.config.selector == "gradient":
        return ends.loaded
    if planned.config.quantize_embeddings:
        return 0
    return ends.held if settings.embedding_on_cpu else ends.loaded


def _attaching(planned: Planned, held: dict[str, int], shapes: Shapes, ends: int) -> int:
    """What comes beside a loaded base and the positions: a selection, then the ends in two forms,
    then the values, beside ends in INT8."""
    selecting = one_selection_nbytes(planned, shapes)
    learned = held["values"] + held.get("streamed state", 0)
    if not shapes.quantizing:
        return max(selecting, learned)
    if not ends:  # they come from the host, and in INT8
        return max(selecting, shapes.quantizing, shapes.ends.in_int8 + learned)
    return max(selecting, shapes.quantizing, learned + shapes.ends.held - shapes.ends.loaded)


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
