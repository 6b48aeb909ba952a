"""Of the card of an adapter in PEFT's form: how to load it, and over which base it holds.

An adapter is offsets to the weights that it was trained over. Over the same base in another format
they are offsets to other weights; PEFT adds them all the same, so the card has to say it. Figures
are those of `benchmarks/peft_forms.py`, which a test compares with its result.
"""

from __future__ import annotations

from leanlift.adapters import Adapter, PeftForm
from leanlift.weights.quantized import WeightFormat

LOAD = """## Use

Stock PEFT loads it, without leanlift:

```python
{imports}
base = {kind}.from_pretrained(
    {base!r},
    dtype="{dtype}",{quantized}
)
model = PeftModel.from_pretrained(base, "{name}")
```

`leanlift export {name} MERGED` merges it, as it does leanlift's own adapters.
"""

QUANTIZED = """
    quantization_config=BitsAndBytesConfig({arguments}),"""

MEASURED = (
    "SmolLM2-135M-Instruct, taught two sentences in {steps} steps over NF4 (leanlift's "
    "benchmarks/peft_forms.py)"
)
"""What the figures were measured on."""

STEPS = 12
TAUGHT = {
    "trained": 0.51,
    "nf4 alone": 3.35,
    "shira over 16 bits": 0.73,
    "shira over nf4, merged by peft": 2.95,
}
"""The loss of the answers, in nats a token, by model."""

APART = {"largest_difference": 15.9, "largest_logit": 41.4}
"""Logits over 16 bits beside those of the model that was trained."""

CHANGE_MADE = 0.06
"""Share of the change of the weights that PEFT's merge over NF4 leaves."""


def peft_use(adapter: Adapter, name: str, base: str, kind: str, form: PeftForm) -> list[str]:
    """The last two sections of the card.

    Args:
        adapter: what was written.
        name: of the output directory.
        base: what the base is called.
        kind: transformers' Auto class that loads it.
        form: which.
    """
    formats = dict.fromkeys(adapter.base.formats[module] for module in adapter.base.shapes)
    quantized = [fmt for fmt in formats if fmt.kind != "dense"]
    loaded = quantized if form.holds_quantized else []
    imports = "from peft import PeftModel\n"
    if loaded:
        imports = "import torch\n" * (loaded[0].kind != "int8") + imports
    names = f"{kind}, BitsAndBytesConfig" if loaded else kind
    use = LOAD.format(
        imports=f"{imports}from transformers import {names}\n",
        name=name,
        base=base,
        kind=kind,
        dtype=adapter.base.dtype,
        quantized=_quantized(loaded[0], adapter.base.dtype) if loaded else "",
    )
    words = ", ".join(str(fmt) for fmt in (quantized or formats))
    return ["## Over which base", "", _over(words, bool(quantized), form), "", use]


def _quantized(fmt: WeightFormat, dtype: str) -> str:
    """The argument by which transformers loads a base in this format."""
    arguments = "load_in_8bit=True"
    if fmt.kind != "int8":
        arguments = (
            f'\n        load_in_4bit=True,\n        bnb_4bit_quant_type="{fmt.kind}",'
            f"\n        bnb_4bit_use_double_quant={fmt.double},"
            f"\n        bnb_4bit_compute_dtype=torch.{dtype},\n    "
        )
    return QUANTIZED.format(arguments=arguments)


def _over(words: str, quantized: bool, form: PeftForm) -> str:
    """Over which weights it holds, and what it is over others."""
    if not quantized:
        return (
            f"It was trained over {words} weights, and is what was trained over those alone: over "
            "a quantized base, its offsets are added to other weights."
        )
    measured = MEASURED.format(steps=STEPS)
    plain, alone, trained = (TAUGHT[key] for key in ("shira over 16 bits", "nf4 alone", "trained"))
    over_plain = (
        f"Measured on {measured}: over 16 bits logits differ by up to "
        f"{APART['largest_difference']} (the largest is {APART['largest_logit']}), and the loss "
        f"of what was taught is {plain} instead of {trained} ({alone} without the adapter)."
    )
    if not form.holds_quantized:
        return (
            f"It was trained over {words} weights, and PEFT has {form.words} over 16-bit ones "
            "alone, which are not what it was trained over: what was learned is there, the model "
            f"that was trained is not. {over_plain} PEFT's SHiRA form (`--format peft`), loaded "
            "over the base in its format, and a merge `--onto quantized` are that model."
        )
    return (
        f"It was trained over {words} weights, and is the model that was trained over a base in "
        f"that format alone: load it as below. {over_plain} PEFT's own `merge_and_unload` over a "
        "quantized base quantizes base and offsets again: of the change of the weights, "
        f"{CHANGE_MADE:.0%} was left there, and the loss was "
        f"{TAUGHT['shira over nf4, merged by peft']}. Merge it with leanlift instead."
    )
