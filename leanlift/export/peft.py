"""From leanlift's adapter to one that stock PEFT loads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

from leanlift.adapters import FORMS, WEIGHTS_NAME, open_adapter, plan_peft, write_peft
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
        rank: of SHiRA, r: each module has r · (m + n) entries; else None.
        sparsity: of Super-Tuning: each has int(m · n · (1 - sparsity)) entries; else None.
        entries: the adapter's own entries.
        padding: zeros beside them, which PEFT's one budget for all modules asks for.
        nbytes: of the weights, and `source_nbytes` of the adapter's.
        form: the name of the form.
        only_plain: the format of a quantized base that was trained over, where PEFT does not have
            this form over such a one; else None.
    """

    output: str
    rank: int | None
    entries: int
    padding: int
    nbytes: int
    source_nbytes: int
    form: str = "shira"
    sparsity: float | None = None
    only_plain: str | None = None


def export_peft(
    adapter: str | Path,
    output: str | Path,
    progress: bool = True,
    form: str = "shira",
    base: str | Path | None = None,
) -> PeftReport:
    """Write an adapter in a form of PEFT's, which `PeftModel.from_pretrained` loads.

    Args:
        adapter: a directory or a hub name.
        output: a new directory.
        progress: whether to show a bar over the matrices.
        form: "shira" or "super-tuning".
        base: of an adapter that PEFT has trained, its base; default: the one that it names.

    Raises:
        UserError: a damaged adapter, one that has no place in that form, or an output that exists.
            Nothing is left behind then.
    """
    if form not in FORMS:
        raise UserError(f"expected form to be one of {', '.join(FORMS)}, got {form!r:.80}.")
    out, chosen = Path(output), FORMS[form]
    with open_adapter(adapter, base=base) as opened:
        plan = plan_peft(opened, chosen)
        check_space(out, plan.nbytes)
        with new_directory(out) as partial:
            write_peft(
                partial,
                opened,
                plan,
                lambda names: tqdm(names, desc="Converting", unit="matrix", disable=not progress),
            )
            copy_tokenizer(opened.directory, partial)
            card = peft_card(opened, out.name, chosen)
            (partial / CARD_NAME).write_text(card, encoding="utf-8")
        source = (opened.directory / WEIGHTS_NAME).stat().st_size
        held = {opened.base.formats[name] for name in opened.base.shapes}
    quantized = sorted(str(fmt) for fmt in held if fmt.kind != "dense")
    return PeftReport(
        output=str(out),
        rank=plan.settings.get("r"),
        entries=plan.count,
        padding=plan.padding,
        nbytes=plan.nbytes,
        source_nbytes=source,
        form=form,
        sparsity=plan.settings.get("sparsity"),
        only_plain=None if chosen.holds_quantized or not quantized else ", ".join(quantized),
    )
