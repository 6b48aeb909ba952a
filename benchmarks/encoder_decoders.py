"""Every class that transformers registers for sequences to sequences: what is said of it.

Those that read with an encoder and write with a decoder are refused from their config.json, which
is all of them that is written here. A configuration of another kind (a model of sound and text that
is registered twice) is in `families_others.csv`.

    python -m benchmarks.encoder_decoders
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.families import put
from leanlift import UserError
from leanlift.cli.kinds import check_kind
from leanlift.plan.base import FakeBase

RESULT = RESULTS / "families_encoders.csv"


def write_config(family: str, named: str, place: Path) -> Any:
    """The configuration that transformers has for a family, as a checkpoint of a class has it."""
    from transformers import CONFIG_MAPPING, BertConfig

    kind = CONFIG_MAPPING[family]
    if family == "encoder-decoder":
        config: Any = kind(encoder=BertConfig().to_dict(), decoder=BertConfig().to_dict())
    else:
        config = kind()
    config.architectures = [named]
    config.save_pretrained(place)
    return config


def one(family: str, named: str) -> dict[str, Any] | None:
    """What becomes of a family; None: it does not read with an encoder of text."""
    row: dict[str, Any] = {"family": family, "class": named, "stage": "config"}
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        if not write_config(family, named, place).is_encoder_decoder:
            return None
        said = []
        for look in (
            lambda: check_kind(place, family, trusted=False),
            lambda: FakeBase.of(place),
        ):
            try:
                look()
            except UserError as error:
                said.append(str(error).replace(str(place), family))
    found = "refused" if len(said) == 2 and said[0] == said[1] else "FAILED"
    return {**row, "found": found, "said": said[0] if said else "nothing"}


def main() -> None:
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as REGISTERED,
    )

    for family, named in REGISTERED.items():
        found = one(family, named)
        if found is not None:
            print(family, found["found"], found["said"], flush=True)
            put(found, RESULT)


if __name__ == "__main__":
    main()
