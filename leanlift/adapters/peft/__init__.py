"""PEFT's forms of an adapter, which stock PEFT loads without leanlift: SHiRA and Super-Tuning.

Both keep per module a list of positions and a list of offsets, and differ in what those are called,
in how many there must be, and in what else their configuration may ask for: a `PeftForm` each.
What PEFT has no place for goes to `leanlift.json` beside its files: the fingerprint of the base,
the LiftConfig, and how many entries of each module are active and retired (they come in that order,
each sorted). Of an adapter without that file, trained by PEFT itself, the base is asked what it is:
a live model, or the checkpoint on this machine that its configuration names.

Shapes: m rows, n columns, e entries of a module, padding included.
"""

from leanlift.adapters.peft.form import PeftForm
from leanlift.adapters.peft.read import read_peft
from leanlift.adapters.peft.shira import SHIRA
from leanlift.adapters.peft.supertuning import SUPERTUNING
from leanlift.adapters.peft.write import PeftPlan, plan_peft, write_peft

FORMS: dict[str, PeftForm] = {form.name: form for form in (SHIRA, SUPERTUNING)}
"""By their names."""

FORM_OF_TYPE = {form.peft_type: form for form in FORMS.values()}
"""By what an adapter_config.json calls them."""

__all__ = [
    "FORMS",
    "FORM_OF_TYPE",
    "PeftForm",
    "PeftPlan",
    "plan_peft",
    "read_peft",
    "write_peft",
]
