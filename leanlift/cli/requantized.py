"""`leanlift export --format gguf`, `bnb-…` and `ct-…`: the forms that people run."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from leanlift.errors import UserError
from leanlift.requantized.kinds import DTYPES, kind_of

if TYPE_CHECKING:
    from leanlift.requantized.check import Comparison
    from leanlift.requantized.wanted import Wanted

FEW_BITS = ("bnb-nf4", "bnb-int8", "ct-fp8", "ct-w8a16", "ct-w4a16")
"""Checkpoints as bitsandbytes and compressed-tensors hold them, and the kind in each."""


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


def export_few_bits(options: argparse.Namespace) -> int:
    """A checkpoint in 4 or 8 bits."""
    from leanlift.measure import human
    from leanlift.requantized.bnb import Bnb
    from leanlift.requantized.checkpoint import Library, write_checkpoint
    from leanlift.requantized.compressed import CompressedTensors

    whose, kind = options.format.split("-")
    library: Library = Bnb(kind) if whose == "bnb" else CompressedTensors(kind)
    shards = options.max_shard_size or "5GB"
    done = write_checkpoint(_wanted(options), options.output, library, shards)
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
