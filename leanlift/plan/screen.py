"""A plan as a screen: what it holds for, where the bytes go, which cards are large enough.

At most 80 columns, without colour. Every word that a reader may not know is explained below the
table in which it stands, and nothing is explained that is not there.
"""

from __future__ import annotations

import textwrap
from typing import Any

from leanlift.format import bar, count, duration, gib, share, short_name, size, table
from leanlift.plan.result import MOMENTS

CARDS_SHOWN = (4, 6, 8, 12, 16, 24)
WIDTH = 80

TERMS = {
    "index": "where the trained entries are in their matrices",
    "values": "their offsets from the base: what is trained",
    "retired entries": "trained once, let go by a refresh; offsets are kept",
    "gradients": "one for each trained entry, none for the rest",
    "optimizer state": "two running means for each trained entry",
    "streamed state": "of two blocks at a time: positions, offsets, running means",
    "scratch": "one matrix, unpacked: the layers take turns",
    "activations and workspace": "kept for the backward pass, and temporary tensors",
}
"""What a reader may not know, in at most 53 characters."""

BASES = {"nf4": "NF4", "fp4": "FP4", "int8": "INT8"}


def format_plan(plan: dict[str, Any]) -> str:
    """The screen of a plan, as `MemoryPlan.to_dict` has it."""
    return "\n".join(
        [*header(plan), "", *byte_table(plan), "", *peak_line(plan), *cards(plan),
         *time_lines(plan), "", *terms(plan), *_wrapped(*plan["notes"])]
    ).rstrip()  # fmt: skip


def header(plan: dict[str, Any]) -> list[str]:
    """What is planned: model, rows and tokens, how the base is held, optimizer, dtypes."""
    held = plan["holds_for"]
    base = f"base in {BASES.get(held['base'], held['dtype'])}"
    if held["bnb_4bit_use_double_quant"]:
        base += " with double quantization"
    if held["quantize_embeddings"]:
        base += ", embedding and head in INT8"
    if held["embedding_on_cpu"]:
        base += ", embedding on the CPU"
    if held.get("stream_base"):
        state = " with what is learned in them" if held.get("stream_state") else ""
        base += f", its blocks streamed from the host's memory{state}"
    values = f"offsets in {held['values_dtype']}, optimizer {held['optim']}"
    if held["optim_in_backward"]:
        values += " in the backward pass"
    kept = f"activations {'recomputed' if held['gradient_checkpointing'] else 'kept'}"
    if held.get("kept_blocks"):
        kept += f" but for the last {held['kept_blocks']} blocks"
    kept += " with weights made once for it" if held.get("reuse_weights") else ""
    kept += " and moved to the CPU" if held["activation_offloading"] else ""
    if held.get("tiled_mlp"):
        most = held.get("mlp_tokens")
        kept += f", MLPs in pieces{f' of up to {most} tokens' if most else ''}"
    if held.get("fused_elementwise"):
        kept += ", norms, rotary embedding and gated products fused"
    refreshed = held["refresh_interval"]
    again = f"selected anew every {refreshed} steps" if refreshed else "selected once"
    return _wrapped(
        f"{short_name(plan['model'])}: {count(plan['entries'])} of {count(plan['weights'])} "
        f"weights are trained ({share(plan['entries'], plan['weights'])}), {again}.",
        f"A step: {_batch(held)}; {base}, the rest in {held['dtype']}; {values}; {kept}.",
    )


def _batch(held: dict[str, Any]) -> str:
    rows, tokens = held["per_device_train_batch_size"], held["max_length"]
    times = held["gradient_accumulation_steps"]
    text = f"{rows} row{'s' * (rows != 1)} × {tokens:,} tokens"
    if held["trained_tokens"] is not None:
        text += f" ({count(held['trained_tokens'])} of them trained)"
    return text if times == 1 else f"{text}, {times} times"


def byte_table(plan: dict[str, Any]) -> list[str]:
    """What takes how much at the peak; what takes nothing is not there."""
    categories: dict[str, int] = plan["categories"]
    total = max(plan["peak"], sum(categories.values()))
    more = total - sum(categories.values())
    rows = [(label(plan, name), nbytes) for name, nbytes in categories.items() if nbytes]
    if more:
        rows.append((f"more {MOMENTS[plan['peak_phase']]}", more))
    small = total < 2**30
    shown = size if small else gib
    cells = [
        (name, shown(nbytes), share(nbytes, total), bar(nbytes, total, 24))
        for name, nbytes in rows
        if shown(nbytes) != "0"
    ]
    cells.append(("peak of tensors", shown(total), "", ""))
    lines = table(cells, ("what", "size" if small else "GiB", "share", ""))
    return _bars_to_the_left(lines, [row[3] for row in cells])


def _bars_to_the_left(lines: list[str], bars: list[str]) -> list[str]:
    """The last column of a table from its left edge: bars begin in one line."""
    widest = max(map(len, bars))
    edge = max(len(line) for line in lines) - widest
    plain = [line[:edge].rstrip() for line in lines[2:]]
    drawn = [f"{text.ljust(edge)}{part}".rstrip() for text, part in zip(plain, bars, strict=True)]
    return [*lines[:2], *drawn]


def label(plan: dict[str, Any], category: str) -> str:
    """A category's name: what is neither weight nor state is named for the moment of the peak."""
    if category == "activations and workspace" and plan.get("step_moment") == "optimizer's step":
        return "workspace of the optimizer's step"
    return category


def peak_line(plan: dict[str, Any], width: int = WIDTH) -> list[str]:
    """When it is, and what a card needs besides."""
    text = f"The peak is {MOMENTS[plan['peak_moment']]}."
    if plan["context"]:
        text += (
            f" CUDA itself takes {size(plan['context'])} of a card: {size(plan['needed'])} in all."
        )
    held = plan["holds_for"]
    if held.get("stream_base"):
        pinned = ", pinned" if held["cuda"] else ""
        what = "the base and of what is learned" if held.get("stream_state") else "the base"
        text += f" The host's memory holds {size(plan['host'])} of {what}{pinned}."
    return textwrap.wrap(text, width)


def cards(plan: dict[str, Any]) -> list[str]:
    """A line per card: what is left, or missing. None for a run on the CPU."""
    if not plan["holds_for"]["cuda"]:
        return []
    lines = [""]
    for card in CARDS_SHOWN:
        left = card * 2**30 - plan["needed"]
        verdict = f"fits, {size(left)} free" if left >= 0 else f"lacks {size(-left)}"
        lines.append(f"{card:>3} GB card  {verdict}")
    return lines


def time_lines(plan: dict[str, Any]) -> list[str]:
    """How long a step takes on a card, where one was asked for or is there."""
    time = plan.get("time")
    if time is None:
        return []
    parts = [f"{name} {brief(seconds)}" for name, seconds in time["parts"].items()
             if seconds >= 0.01 * time["seconds"]]  # fmt: skip
    how = "from figures measured here" if time["calibrated"] else "from the card's data sheet"
    return ["", *_wrapped(
        f"A step takes about {brief(time['seconds'])} on {time['card']}, modelled {how}: "
        f"{count(round(time['tokens_per_second']))} tokens/s ({', '.join(parts)})."
    )]  # fmt: skip


def brief(seconds: float) -> str:
    """A time, in milliseconds where it is short."""
    return duration(seconds) if seconds >= 0.1 else f"{1000 * seconds:.1f} ms"


def terms(plan: dict[str, Any]) -> list[str]:
    """The words of the table that need a word."""
    shown = [name for name, nbytes in plan["categories"].items() if nbytes and name in TERMS]
    width = max(map(len, shown), default=0)
    trained = "the weights that get an offset; the others are frozen"
    lines = [f"{'trained entries'.ljust(width)}  {trained}"]
    for name in shown:
        if label(plan, name) == name:
            lines.append(f"{name.ljust(width)}  {TERMS[name]}")
    return lines


def _wrapped(*texts: str) -> list[str]:
    return [line for text in texts for line in textwrap.wrap(text, WIDTH)]
