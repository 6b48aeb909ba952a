"""The adapter on disk: leanlift's own form, and two of PEFT's, SHiRA and Super-Tuning.

An adapter is a file from the internet. Reading one executes nothing, writes nothing, allocates no
more than the files hold, and gives sorted positions inside the matrices they belong to, or a
UserError. Modules are read one at a time, so a merge never holds a whole adapter.
"""

from leanlift.adapters.combine import combine_adapters
from leanlift.adapters.native import (
    AdapterMetadata,
    check_adapter_place,
    check_values,
    write_adapter,
)
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.peft import FORMS, PeftForm, PeftPlan, plan_peft, write_peft
from leanlift.adapters.read import open_adapter
from leanlift.io.places import CONFIG_NAME, FACTS_NAME, RUN_NAME, WEIGHTS_NAME

__all__ = [
    "CONFIG_NAME",
    "FACTS_NAME",
    "FORMS",
    "RUN_NAME",
    "WEIGHTS_NAME",
    "Adapter",
    "AdapterMetadata",
    "PeftForm",
    "PeftPlan",
    "check_adapter_place",
    "check_values",
    "combine_adapters",
    "open_adapter",
    "plan_peft",
    "write_adapter",
    "write_peft",
]
