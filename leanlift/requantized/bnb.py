"""From an adapter to a checkpoint that transformers holds in 4 or 8 bits by bitsandbytes.

Adapter and base are merged into a temporary directory, transformers loads and quantizes that, and
saves it as it is held. Anybody then loads it in a quarter or half of the room, without the 16-bit
weights. What quantization loses is measured as for a GGUF file, the base alone going the same way.
"""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
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
from leanlift.tiles import row_ranges, tile_rows
from leanlift.training.arguments import RunArguments
from leanlift.training.base import load_model
from leanlift.weights.quantized import WeightFormat, dtype_of, requantize

KINDS = ("nf4", "int8")

MARKS = (".weight.absmax", ".SCB")
"""What a quantized matrix has beside its codes, in a checkpoint in 4 bits and in 8."""


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


def write_bnb(wanted: Wanted, output: str | Path, kind: str, shards: str = "5GB") -> Written:
    """Write an adapter and its base as a checkpoint in 4 or 8 bits.

    Args:
        wanted: of which adapter, and how it is merged.
        output: a new directory.
        kind: "nf4" (with double quantization) or "int8"; what is quantized are the Linears that
            transformers quantizes, which leaves the head out.
        shards: the largest file, as in `save_pretrained`.

    Raises:
        UserError: no room on the disk, whatever `merge_adapter` and `load_model` refuse, or a merge
            that is not what adapter and base compute. Nothing is left behind then.
    """
    out = Path(output)
    with known(wanted) as found:
        sixteen = dtype_of(wanted.dtype).itemsize * found.weights
        check_space(out, (3 if wanted.verify else 2) * sixteen)
        with new_directory(out) as partial:
            work = partial / "work"
            work.mkdir()
            merged = merge(wanted, work / out.name)
            with quiet_loading():
                _quantize(Path(merged.output), partial, kind, wanted.dtype, shards)
                compared = None
                if wanted.verify and found.rows is not None:
                    compared = _compare(found.adapter, wanted, found.rows, merged, partial, kind)
            shutil.rmtree(work)
            nbytes = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
            matrices = len(_quantized_in(partial))
    return Written(str(out), nbytes, matrices, merged, compared)


def _quantize(place: Path, output: Path, kind: str, dtype: str, shards: str) -> None:
    """Load a merge in few bits, and save it as it is held, with the merge's small files."""
    carry_over(place, output)
    model = _load(place, kind, dtype)
    model.save_pretrained(output, max_shard_size=shards)
    for file in output.glob("*.safetensors"):
        give_usual_mode(file)
    card = (place / CARD_NAME).read_text(encoding="utf-8").partition("With vLLM")[0]
    (output / CARD_NAME).write_text(card, encoding="utf-8")


def _load(place: Path, kind: str, dtype: str) -> Any:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args = RunArguments(
        model_name_or_path=str(place),
        load_in_4bit=kind == "nf4",
        load_in_8bit=kind == "int8",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        dtype=dtype,
    )
    return load_model(args, device, experts_too=False).eval()


def _compare(
    adapter: Adapter, wanted: Wanted, rows: OwnRows, merged: MergeReport, output: Path, kind: str
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
    base_loss = _loss(Path(base.output), kind, wanted.dtype, asked)
    change = change_in_checkpoints(Path(base.output), place, _quantized_in(output), kind, merged)
    losses = (before, after, written)
    return compare("transformers", kind, asked, same, losses, base_loss, change)


def _loss(place: Path, kind: str, dtype: str, asked: Asked) -> float:
    return loss_of(Stock(_load(place, kind, dtype)), asked)


def change_in_checkpoints(
    base: Path, merged: Path, names: list[str], kind: str, report: MergeReport
) -> Change:
    """Compare the matrices of two 16-bit checkpoints, in 16 bits and quantized alike, one by one.

    Args:
        base, merged: their directories.
        names: of the matrices that are quantized.
        kind: how.
        report: of the merge, for its dtype.
    """
    fmt = WeightFormat(kind, report.dtype, *((64, True) if kind == "nf4" else ()))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = Change()
    with open_checkpoint(base) as before, open_checkpoint(merged) as after:
        for name in names:
            if name not in before or name not in after:  # transformers saves it as another tensor
                continue
            pair: list[Any] = [before[name], after[name]]
            held: list[Any] = [requantize(tiles, fmt, device) for tiles in pair]
            m, n = pair[0].shape
            for start, stop in row_ranges(m, tile_rows(n, 4)):
                rows = [tiles.rows(start, stop).cpu() for tiles in (*pair, *held)]
                found.add(*rows)
    return found


def _quantized_in(directory: Path) -> list[str]:
    """The matrices of a checkpoint that bitsandbytes holds in few bits."""
    with open_checkpoint(directory) as tensors:
        found = [name for name in tensors if name.endswith(MARKS)]
    return [name.removesuffix(".absmax").replace(".SCB", ".weight") for name in found]
