"""What training shall keep: the loss on rows that it does not teach, before its first step and
after its last.

The loss is the plain cost of the next tokens, whatever is trained on, over rows one at a time: no
padding, no generation, and through the tiled head no logits of more than a tile. Each process
takes a part of the rows, through the model itself, which waits for nobody. What the base made of
each row stays with the run's checkpoints, so that a run that is gone on with still compares with
the base and not with where it went on; where it is not there, or is of other rows, the base is
measured with the adapter turned off. Random numbers are not touched: the run is the same with and
without this.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from leanlift.data.positions import check_positions
from leanlift.errors import UserError
from leanlift.io.measured import KeptLoss
from leanlift.io.tensors import read_json
from leanlift.layers.lm_head import Objective
from leanlift.model import lifted, output_head
from leanlift.paired import change
from leanlift.plan import Batch
from leanlift.processes import of_all, processes, rank
from leanlift.training.batches import Batches, lengths_of, size_of
from leanlift.training.checkpointing.names import TRAINER_STATE
from leanlift.training.checkpointing.settings import data_facts
from leanlift.training.loss import TiledLoss, TrainingLoss, WholeLoss
from leanlift.training.own_loss import compared
from leanlift.training.screens import Screen

MEASURING = "Measuring what is kept"

Say = Callable[[int, int, float | None], None]
"""Rows done, of how many, seconds left."""


@dataclass(frozen=True)
class KeptRows:
    """Rows that training shall keep.

    Attributes:
        name: by which they are told of.
        data: tokenized, `input_ids` and `labels`.
        origin: the number of the row that each is of; None: each is of its own.
    """

    name: str
    data: Dataset
    origin: Sequence[int] | None = None

    @property
    def tokens(self) -> list[int]:
        """That count in the loss, of each row."""
        return [int(number) for number in lengths_of(self.data)[1]]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(lengths_of(self.data)[0].max())


def with_kept(batches: Batches, kept: Sequence[KeptRows], evaluates: bool) -> Batches:
    """The worst batches of a run that also measures such rows, one at a time. Where other rows are
    evaluated that nobody has looked at, these are taken to be larger."""
    worst = batches.eval
    if not kept or (worst is None and evaluates):
        return batches
    each = [Batch(1, rows.longest, max(rows.tokens)) for rows in kept]
    return replace(batches, eval=max([*each, *([worst] if worst else [])], key=size_of))


class KeptLosses(TrainerCallback, ExportableState):
    """Measures what is kept, and lets every checkpoint have what the base made of it.

    Attributes:
        before: by the name of the rows, their `digest` and the `losses` of the base, a sum per row.
    """

    def __init__(self, rows: Sequence[KeptRows] = ()) -> None:
        self.rows = rows
        self.before: dict[str, Any] = {}

    def state(self) -> dict[str, Any]:
        """As Trainer keeps it in its state; a base whose loss is not finite is measured again."""
        fine = {name: held for name, held in self.before.items() if _are_finite(held["losses"])}
        return {"args": {}, "attributes": {"before": fine}}

    def begin(self, trainer: Any, resume: str | None, screen: Screen) -> None:
        """Before the first step: what the base makes of the rows.

        Args:
            trainer: ready to train.
            resume: the checkpoint that it will go on from.
            screen: shows how far it has come.

        Raises:
            UserError: rows longer than the model has positions for.
        """
        inner = lifted(trainer.model)
        for rows in self.rows:
            what = f"the longest row of {rows.name}, which is to be kept,"
            check_positions(inner, rows.longest, what, "set max_length")
        known = {} if resume is None else _saved(Path(resume))
        digests = {rows.name: _digest(rows) for rows in self.rows}
        lacking = [r for r in self.rows if not _is_of(known.get(r.name), r, digests[r.name])]
        off = nullcontext() if resume is None else trainer.model.disable_adapter()
        with off:
            found = _measured(trainer, lacking, screen)
        measured = {
            rows.name: {"digest": digests[rows.name], "losses": losses}
            for rows, losses in zip(lacking, found, strict=True)
        }
        self.before = {rows.name: measured.get(rows.name) or known[rows.name] for rows in self.rows}

    def end(self, trainer: Any, screen: Screen) -> tuple[KeptLoss, ...]:
        """After the last step: what became of the rows."""
        after = _measured(trainer, self.rows, screen)
        return tuple(
            _kept(rows, self.before[rows.name]["losses"], losses)
            for rows, losses in zip(self.rows, after, strict=True)
        )


def _kept(rows: KeptRows, before: Sequence[float], after: Sequence[float]) -> KeptLoss:
    counts = rows.tokens
    total, differs = sum(counts), change(before, after, counts, rows.origin)
    assert differs is not None, "rows without a token that counts are dropped as they are read"
    first, last = math.fsum(before) / total, math.fsum(after) / total
    return KeptLoss(rows.name, len(counts), total, first, last, differs.mean, differs.error)


def _measured(trainer: Any, parts: Sequence[KeptRows], screen: Screen) -> list[list[float]]:
    """`losses_of` as a part of a run, if there is something to measure."""
    if not parts:
        return []
    with screen.phase(MEASURING):
        return losses_of(trainer, parts, partial(screen.progress, MEASURING))


def losses_of(trainer: Any, parts: Sequence[KeptRows], say: Say) -> list[list[float]]:
    """The summed loss of each row of each part, as the trainer's model has it now; by all processes
    together."""
    model, autocast = lifted(trainer.model), trainer.accelerator.autocast
    cost = plain_loss(model, autocast)
    own = [(part, i) for part in parts for i in range(rank(), len(part.data), processes())]
    sums, counts = [], {part.name: part.tokens for part in parts}
    was_training, begun = model.training, time.monotonic()
    model.eval()
    try:
        with torch.no_grad():
            for done, (part, i) in enumerate(own, 1):
                ids, labels = (
                    torch.tensor([part.data[i][key]], device=trainer.args.device)
                    for key in ("input_ids", "labels")
                )
                with autocast():
                    mean = cost(model, {"input_ids": ids, "labels": labels})
                sums.append(float(mean) * counts[part.name][i])
                left = (time.monotonic() - begun) / done * (len(own) - done)
                say(done, len(own), left)
    finally:
        model.train(was_training)
    found = {part.name: [0.0] * len(part.data) for part in parts}
    for process, theirs in enumerate(of_all(sums)):
        places = [(p, i) for p in parts for i in range(process, len(p.data), processes())]
        for (part, i), total in zip(places, theirs, strict=True):
            found[part.name][i] = total
    return [found[part.name] for part in parts]


def plain_loss(model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> TrainingLoss:
    """The cost of the next tokens, smoothed and weighted by nothing, by tiles of the vocabulary
    where the model's logits are a head's."""
    finish = compared(model, output_head(model), autocast()).finish
    return WholeLoss(Objective()) if finish is None else TiledLoss(Objective(), finish)


# --- what a checkpoint has ---------------------------------------------------------------------


def _digest(rows: KeptRows) -> str:
    return str(data_facts(rows.data)["data_digest"])


def _saved(checkpoint: Path) -> dict[str, Any]:
    """What the base made of a run's rows, by a checkpoint of it; nothing where it does not say."""
    try:
        state = read_json(checkpoint / TRAINER_STATE)
        found = state["stateful_callbacks"][KeptLosses.__name__]["attributes"]["before"]
    except (UserError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_of(saved: Any, rows: KeptRows, digest: str) -> bool:
    """Whether losses that were saved are of these rows."""
    if not isinstance(saved, dict) or saved.get("digest") != digest:
        return False
    losses = saved.get("losses")
    return isinstance(losses, list) and len(losses) == len(rows.data) and _are_finite(losses)


def _are_finite(losses: Sequence[Any]) -> bool:
    return all(type(loss) in (int, float) and math.isfinite(loss) for loss in losses)
