"""From an adapter to a checkpoint that others hold in few bits.

Adapter and base are merged into a temporary directory, a library loads and quantizes that, and
saves it as it is held. Anybody then loads it in a quarter or half of the room, without the 16-bit
weights. What quantization loses is measured as for a GGUF file, the base alone going the same way.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM

from leanlift.adapters import Adapter
from leanlift.evaluation.evaluate import quiet_loading
from leanlift.evaluation.verify import BOUNDS, ask_both
from leanlift.export import MergeReport, check_space
from leanlift.export.card import CARD_NAME
from leanlift.export.directory import carry_over
from leanlift.io.files import give_usual_mode
from leanlift.io.tensors import new_directory
from leanlift.requantized.asked import Asked, OwnRows, ask, asked_of, logits_of, loss_of
from leanlift.requantized.change import Change
from leanlift.requantized.check import Comparison, compare, same_model
from leanlift.requantized.runtime import Stock, quick_dtype
from leanlift.requantized.wanted import Wanted, known, merge
from leanlift.source import open_checkpoint
from leanlift.tiles import RowTiles, row_ranges, tile_rows
from leanlift.weights.quantized import dtype_of


class Held(Protocol):
    """A matrix [m, n] as it is held in few bits."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Some of its rows, dequantized."""


class Library(Protocol):
    """How a library holds a model in few bits.

    Attributes:
        kind: what it is called.
        marks: how the names of what a held matrix has beside its codes end, instead of `.weight`.
    """

    kind: str
    marks: tuple[str, ...]

    def check(self, source: Path) -> None:
        """Refuse a base that cannot be held so, before anything slow.

        Raises:
            UserError: it cannot, or the library is not installed.
        """

    def load(self, place: Path, dtype: str) -> Any:
        """A 16-bit checkpoint, as a model that computes as it will be held."""

    def save(self, model: Any, output: Path, shards: str) -> None:
        """Write what was loaded, as it is held."""

    def hold(self, tiles: RowTiles, dtype: str) -> Held:
        """One matrix of such a checkpoint."""


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        output: the directory.
        nbytes: of its weights.
        matrices: that are quantized.
        merged: the merge that it was made of.
        comparison: what was found of it; None: nothing was compared.
    """

    output: str
    nbytes: int
    matrices: int
    merged: MergeReport
    comparison: Comparison | None


def write_checkpoint(
    wanted: Wanted, output: str | Path, library: Library, shards: str = "5GB"
) -> Written:
    """Write an adapter and its base as a checkpoint in few bits.

    Args:
        wanted: of which adapter, and how it is merged.
        output: a new directory.
        library: what quantizes the merge.
        shards: the largest file, as in `save_pretrained`.

    Raises:
        UserError: no room on the disk, whatever `merge_adapter` and the library refuse, or a merge
            that is not what adapter and base compute. Nothing is left behind then.
    """
    out = Path(output)
    with known(wanted) as found:
        library.check(found.source)
        sixteen = dtype_of(wanted.dtype).itemsize * found.weights
        check_space(out, (3 if wanted.verify else 2) * sixteen)
        with new_directory(out) as place:
            work = place / "work"
            work.mkdir()
            merged = merge(wanted, work / out.name)
            with quiet_loading():
                _quantize(Path(merged.output), place, library, wanted.dtype, shards)
                compared = None
                if wanted.verify and found.rows is not None:
                    compared = _compare(found.adapter, wanted, found.rows, merged, place, library)
            shutil.rmtree(work)
            nbytes = sum(file.stat().st_size for file in place.glob("*.safetensors"))
            matrices = len(_quantized_in(place, library))
    return Written(str(out), nbytes, matrices, merged, compared)


def _quantize(place: Path, output: Path, library: Library, dtype: str, shards: str) -> None:
    """Load a merge in few bits, and save it as it is held, with the merge's small files."""
    carry_over(place, output)
    library.save(library.load(place, dtype), output, shards)
    for file in output.glob("*.safetensors"):
        give_usual_mode(file)
    card = (place / CARD_NAME).read_text(encoding="utf-8").partition("With vLLM")[0]
    (output / CARD_NAME).write_text(card, encoding="utf-8")


def _compare(
    adapter: Adapter,
    wanted: Wanted,
    rows: OwnRows,
    merged: MergeReport,
    output: Path,
    library: Library,
) -> Comparison:
    """The checkpoint against adapter and base, and the base's against both.

    Raises:
        UserError: the merge is another model.
    """
    place = Path(merged.output)
    asked = asked_of(rows, place)
    quick = replace(merged, dtype=quick_dtype(merged.dtype))
    before, after = ask_both(adapter, quick, lambda model: ask(Stock(model), asked))
    coarsest = max((merged.dtype, adapter.base.dtype), key=lambda dtype: BOUNDS[dtype])
    sixteen = Stock(
        AutoModelForCausalLM.from_pretrained(
            place, dtype=dtype_of(quick.dtype), trust_remote_code=False
        )
    )
    same = same_model(sixteen, asked, logits_of(sixteen, asked), before, after, coarsest)
    del sixteen
    gc.collect()
    written = ask(
        Stock(AutoModelForCausalLM.from_pretrained(output, trust_remote_code=False)), asked
    )
    gc.collect()
    base = merge(wanted, place.parent / "base", bare=True)
    base_loss = _loss(Path(base.output), library, wanted.dtype, asked)
    names = _quantized_in(output, library)
    hold = partial(library.hold, dtype=merged.dtype)
    change = change_in_checkpoints(Path(base.output), place, names, hold)
    losses = (before, after, written)
    return compare("transformers", library.kind, asked, same, losses, base_loss, change)


def _loss(place: Path, library: Library, dtype: str, asked: Asked) -> float:
    return loss_of(Stock(library.load(place, dtype)), asked)


def change_in_checkpoints(
    base: Path, merged: Path, names: list[str], hold: Callable[[RowTiles], Held]
) -> Change:
    """Compare the matrices of two 16-bit checkpoints, in 16 bits and quantized alike, one by one.

    Args:
        base, merged: their directories.
        names: of the matrices that are quantized.
        hold: quantizes one.
    """
    found = Change()
    with open_checkpoint(base) as before, open_checkpoint(merged) as after:
        for name in names:
            if name not in before or name not in after:  # transformers saves it as another tensor
                continue
            pair: list[Any] = [before[name], after[name]]
            held: list[Any] = [hold(tiles) for tiles in pair]
            m, n = pair[0].shape
            for start, stop in row_ranges(m, tile_rows(n, 4)):
                rows = [tiles.rows(start, stop).cpu() for tiles in (*pair, *held)]
                found.add(*rows)
    return found


def _quantized_in(directory: Path, library: Library) -> list[str]:
    """The matrices of a checkpoint that are held in few bits."""
    names: list[str] = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(str(file), "pt") as tensors:
            names += tensors.keys()
    pairs = [(name, mark) for name in names for mark in library.marks if name.endswith(mark)]
    return [name.removesuffix(mark) + ".weight" for name, mark in pairs]


def device() -> torch.device:
    """What quantizes: a GPU, where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
