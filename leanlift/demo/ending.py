"""What the demo ends with: what was learned, what a 7B model would need, what to do next."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from leanlift import LiftConfig, PlanSettings, plan_memory
from leanlift.format import bar, gib, share, size
from leanlift.report.text import memory_table

SEVEN_B = Path(__file__).parent / "seven_b"
"""The config.json of Qwen2.5-7B's shape: all that a plan needs."""

CARDS = (6, 8, 12, 16, 24)
LENGTH = 2048
BAR = 14


@dataclass(frozen=True)
class Skill:
    """Shares of exact answers of one skill: before, after, and from the merged checkpoint."""

    name: str
    known: bool
    before: float
    after: float
    merged: float


def skills_text(skills: Sequence[Skill], rows: int) -> str:
    """Before and after as bars, a line per skill."""
    lines = [
        f"Exact answers on {rows} held-out examples per skill:",
        "",
        f"{'skill':<22}{'before':<{BAR + 9}}{'after':<{BAR + 9}}merged",
        "─" * 75,
    ]
    for skill in skills:
        label = f"{skill.name:<9}{'known before' if skill.known else 'learned now'}"
        parts = [
            f"{bar(part, 1, BAR):<{BAR}} {share(part):>5}" for part in (skill.before, skill.after)
        ]
        lines.append(
            f"{label:<22}{parts[0]:<{BAR + 9}}{parts[1]:<{BAR + 9}}{share(skill.merged):>6}"
        )
    return "\n".join(line.rstrip() for line in lines)


def memory_text(memory: Mapping[str, Any]) -> str:
    """Where the memory of this run went, against its plan."""
    return "\n".join(["Where the memory went while it trained:", "", *memory_table(dict(memory))])


@dataclass(frozen=True)
class Needs:
    """What a 7B run needs: peak of tensors, and that with the context of CUDA, in bytes."""

    peak: int
    needed: int


def needs_of_7b() -> Needs:
    """Plan a 7B run: one row of 2048 tokens a step, 5 % of every matrix over NF4, bf16 offsets,
    moments in 8 bits, activations recomputed. A few seconds."""
    config = LiftConfig(density=0.05, values_dtype="bfloat16")
    settings = PlanSettings(
        per_device_train_batch_size=1, max_length=LENGTH, optim="sparse_adamw_8bit", cuda=True
    )
    plan = plan_memory(SEVEN_B, config, settings)
    return Needs(plan.peak, plan.needed)


def card() -> tuple[str, int] | None:
    """The reader's own CUDA device: its name and bytes; None where there is none."""
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return str(found.name), int(found.total_memory)


def seven_b_text(needs: Needs, own: tuple[str, int] | None) -> str:
    """What a 7B model would need, and which cards have that."""
    lines = [
        f"A 7B model (Qwen2.5-7B, {LENGTH:,} tokens a step, 5 % of each matrix over NF4) would",
        f"need {gib(needs.needed)} GiB: {gib(needs.peak)} of tensors, the rest is CUDA's own.",
        "",
    ]
    cards = [(f"{size} GB", size * 2**30) for size in CARDS] if own is None else [own]
    wide = max(len(name) for name, _ in cards)
    largest = max([needs.needed, *(nbytes for _, nbytes in cards)])
    for name, nbytes in cards:
        free = nbytes - needs.needed
        said = f"fits, {gib(free)} GiB free" if free >= 0 else f"lacks {gib(-free)} GiB"
        lines.append(f"  {name:<{wide}}  {bar(nbytes, largest, 24):<24}  {said}")
    if any(nbytes < needs.needed for _, nbytes in cards):
        lines += ["", "Where it lacks some, leanlift plan --fit chooses settings that need less."]
    return "\n".join(lines)


def files_text(run: Path, merged: Path, page: Path, same: int, total: int) -> str:
    """What lies where."""
    adapter = sum(file.stat().st_size for file in run.glob("adapter*"))
    rows = [
        ("report", f"{page}: open it in a browser"),
        *([("picture", str(run / "memory.png"))] if (run / "memory.png").is_file() else []),
        ("adapter", f"{run} ({size(adapter)})"),
        ("merged", f"{merged}, an ordinary 16-bit checkpoint"),
    ]
    said = (
        f"Stock transformers, without leanlift, loads the merged checkpoint, and it gives the "
        f"trained model's greedy answer in {same} of {total} cases."
    )
    return "\n".join([*(f"{name:<9}{text}" for name, text in rows), *textwrap.wrap(said, 80)])


NEXT = """With your own rows (JSON lines with messages, prompt and completion, or text):

  leanlift init --model Qwen/Qwen2.5-7B-Instruct --data rows.jsonl --card 12GB
  leanlift train --config run.yaml
  leanlift eval --adapter runs/qwen2.5-7b-instruct-rows --base --data test.jsonl"""
