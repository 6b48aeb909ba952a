"""From leanlift's adapter to one that stock PEFT loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from leanlift.adapters import WEIGHTS_NAME, open_adapter, plan_shira, write_shira
from leanlift.errors import UserError
from leanlift.export.card import CARD_NAME, peft_card
from leanlift.export.directory import check_space
from leanlift.export.tokens import copy_tokenizer
from leanlift.io.tensors import new_directory


@dataclass(frozen=True)
class PeftReport:
    """What was written.

    Attributes:
        output: where.
        rank: r of the SHiRA adapter; each module has r · (m + n) entries.
        entries: the adapter's own entries.
        padding: zeros at (0, 0) beside them, which PEFT's one budget for all modules asks for.
        nbytes: of the weights, and `source_nbytes` of the adapter's.
    """

    output: str
    rank: int
    entries: int
    padding: int
    nbytes: int
    source_nbytes: int


def export_peft(adapter: str | Path, output: str | Path, progress: bool = True) -> PeftReport:
    """Write an adapter in PEFT's SHiRA form, which `PeftModel.from_pretrained` loads.

    Args:
        adapter: a directory or a hub name.
        output: a new directory.
        progress: whether to show a bar over the matrices.

    Raises:
        UserError: a damaged adapter, one whose entries have no room in PEFT's form, or an output
            that exists. Nothing is left behind then.
    """
    out = Path(output)
    with open_adapter(adapter) as opened:
        turned = next(filter(opened.base.layout.is_turned, opened.base.shapes), None)
        if turned is not None:
            raise UserError(
                f"{turned} keeps the transpose of its matrix, as a Conv1D does, and PEFT's SHiRA "
                "takes Linears alone: merge it instead."
            )
        plan = plan_shira(opened)
        check_space(out, plan.nbytes)
        with new_directory(out) as partial:
            write_shira(
                partial,
                opened,
                plan,
                lambda names: tqdm(names, desc="Converting", unit="matrix", disable=not progress),
            )
            copy_tokenizer(opened.directory, partial)
            (partial / CARD_NAME).write_text(peft_card(opened, out.name), encoding="utf-8")
        source = (opened.directory / WEIGHTS_NAME).stat().st_size
    return PeftReport(str(out), plan.rank, plan.count, plan.padding, plan.nbytes, source)
