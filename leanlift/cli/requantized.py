"""`leanlift export --format gguf`, `bnb-nf4` and `bnb-int8`: the forms that people run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from leanlift.errors import UserError
from leanlift.requantized.kinds import DTYPES, kind_of

if TYPE_CHECKING:
    from leanlift.requantized.check import Comparison
    from leanlift.requantized.wanted import Wanted

BNB_FORMATS = {"bnb-nf4": "nf4", "bnb-int8": "int8"}
"""Formats of bitsandbytes', and what they are called in `leanlift.requantized.bnb`."""


def export_gguf(options: argparse.Namespace) -> int:
    """A GGUF file, with what Ollama reads beside it."""
    kind = kind_of(options.quantize, options.dtype)
    from leanlift.measure import human
    from leanlift.requantized.gguf import write_gguf

    done = write_gguf(_wanted(options), options.output, kind, options.llama_cpp)
    types = ", ".join(f"{count} in {name}" for name, count in done.types.items())
    print(
        f"Wrote {done.output}/{done.file}: {human(done.nbytes)}, matrices: {types}; "
        f"{done.merged.merged} matrices of {done.merged.base} were merged, and "
        f"{done.made_by if kind not in DTYPES else 'nothing'} quantized them."
    )
    print(f"Its Modelfile {done.template.words}.")
    _tell(done.comparison)
    return 0


def export_bnb(options: argparse.Namespace) -> int:
    """A checkpoint in 4 or 8 bits."""
    from leanlift.measure import human
    from leanlift.requantized.bnb import write_bnb

    kind = BNB_FORMATS[options.format]
    shards = options.max_shard_size or "5GB"
    done = write_bnb(_wanted(options), options.output, kind, shards)
    print(
        f"Wrote {done.output}: {human(done.nbytes)}, {done.matrices} matrices in {kind}; "
        f"{done.merged.merged} matrices of {done.merged.base} were merged."
    )
    _tell(done.comparison)
    return 0


def _wanted(options: argparse.Namespace) -> Wanted:
    from leanlift.requantized.wanted import Wanted
    from leanlift.weights.quantized import dtype_of

    if options.verify is False and options.data is not None and options.format != "gguf":
        raise UserError("--data names rows to compare on, and --no_verify compares nothing.")
    dtype_of(options.dtype or "float16")
    return Wanted(
        options.adapter,
        base=options.base,
        revision=options.base_revision,
        onto=options.onto or "original",
        dtype=options.dtype or "float16",
        verify=options.verify is not False,
        data=options.data,
    )


def _tell(comparison: Comparison | None) -> None:
    told = ["Not compared with adapter and base."] if comparison is None else comparison.lines()
    print("\n".join(told))
