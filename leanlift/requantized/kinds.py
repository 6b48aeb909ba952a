"""The names of llama.cpp's quantizations, and what each is called in its library.

Needs no torch: a name that is none is refused before anything heavy is imported.
"""

from __future__ import annotations

from leanlift.errors import UserError

DTYPES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}
"""Kinds that are not quantized, and the dtype of the merge that each is made of."""

CONVERTED = "Q8_0"
"""The one quantization that llama.cpp's converter makes by itself, without a quantizer."""

FTYPES = {
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "IQ3_XXS": 23,
    "IQ3_XS": 22,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "Q4_0": 2,
    "Q4_1": 3,
    "IQ4_XS": 30,
    "IQ4_NL": 25,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "Q8_0": 7,
}
"""Quantizations from weights alone, and their number in `llama_ftype` (llama.h), coarsest first."""

ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}

WITH_MATRIX = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "Q2_K_S",
)  # fmt: skip
"""Quantizations that llama.cpp makes with an importance matrix, which takes a run over a text."""


def kind_of(name: str | None, dtype: str | None = None) -> str:
    """What a file is to hold: a key of `DTYPES` or of `FTYPES`.

    Args:
        name: as it was asked for, in any case; None or "none": 16 bits.
        dtype: of the merge, where one was asked for.

    Raises:
        UserError: there is no such quantization, it needs an importance matrix, or it is another
            dtype than the one asked for.
    """
    plain = {named: kind for kind, named in DTYPES.items()}
    if name is None or name.lower() == "none":
        return plain.get(dtype or "float16", "F16")
    kind = ALIASES.get(name.upper(), name.upper())
    if kind in WITH_MATRIX:
        raise UserError(
            f"{kind} needs an importance matrix, which leanlift does not make: write --quantize "
            "F16, then use llama-imatrix and llama-quantize of llama.cpp."
        )
    if kind in DTYPES and dtype not in (None, DTYPES[kind]):
        raise UserError(f"--quantize {name} is {DTYPES[kind]}, and --dtype {dtype}: leave one out.")
    if kind not in DTYPES and kind not in FTYPES:
        raise UserError(
            f"expected --quantize {', '.join((*DTYPES, *FTYPES))} or none, got {name!r}."
        )
    return kind
