"""Choosing settings with which a run fits a card: first what is free, last what costs quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from leanlift.errors import UserError
from leanlift.memory import MemoryPlan, human
from leanlift.training.arguments import SPARSE_OPTIMIZERS, LiftSFTConfig, RunArguments
from leanlift.training.plan import plan_of

Settings = tuple[RunArguments, LiftSFTConfig]
LEAST_DENSITY = 0.01
CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
"""Names of one setting: the later one is transformers' since 5.24, and wins where both are set."""


@dataclass(frozen=True)
class Fit:
    """Settings that fit, and the way there.

    Attributes:
        args, sft: the settings.
        plan: what they need.
        steps: a line per change: what was changed, what it costs, what it brought.
    """

    args: RunArguments
    sft: LiftSFTConfig
    plan: MemoryPlan
    steps: tuple[str, ...]


def parse_card(text: str) -> float:
    """GiB of a card from "8GB", "8 GiB" or "8".

    Raises:
        UserError: not a size.
    """
    number = text.strip().lower().removesuffix("b").removesuffix("gi").removesuffix("g").strip()
    try:
        size = float(number)
    except ValueError:
        size = 0.0
    if not 0 < size < 1e6:
        raise UserError(f"expected the size of a card such as 8GB, got {text!r}.")
    return size


def fit(
    args: RunArguments,
    sft: LiftSFTConfig,
    gib: float,
    cuda: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> Fit:
    """Change settings in a fixed order until the plan fits a card of `gib` GiB.

    Raises:
        UserError: nothing fits; says how much is missing.
    """
    plan = least = plan_of(args, sft, cuda)
    say(f"as configured: {human(plan.needed)}")
    steps: list[str] = []
    pending = changes(args, sft, cuda)
    while not plan.fits(gib):
        if plan.peak_phase == "evaluate" and sft.per_device_eval_batch_size > 1:
            what, changed = _smaller_evaluation(sft.per_device_eval_batch_size // 2)
        elif (following := next(pending, None)) is not None:
            what, changed = following
        else:
            break
        args, sft = changed((args, sft))
        before, plan = plan.needed, plan_of(args, sft, cuda)
        line = f"{what}: {human(plan.needed)} ({human(max(0, before - plan.needed))} less)"
        steps.append(line)
        say(line)
        least = min(least, plan, key=lambda p: p.needed)
    if not plan.fits(gib):
        raise UserError(
            f"{args.model_name_or_path} does not fit {gib:g} GiB: the least setting needs "
            f"{human(least.needed)}, {human(least.needed - int(gib * 2**30))} more than there is; "
            "shorten max_length or take a smaller base."
        )
    return Fit(args, sft, plan, tuple(steps))


def changes(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool = True
) -> Iterator[tuple[str, Callable[[Settings], Settings]]]:
    """What to try against a peak, cheapest first: (what and at what cost, how). On a CPU (`cuda`
    False) nothing can be moved to one."""
    optim = str(getattr(sft.optim, "value", sft.optim))
    if not sft.gradient_checkpointing:
        yield (
            "gradient_checkpointing=true, costs a second forward pass",
            _loop(**{name: True for name in CHECKPOINTING if hasattr(sft, name)}),
        )
    if "8bit" not in optim or optim not in SPARSE_OPTIMIZERS:
        yield (
            "optim=sparse_adamw_8bit, moments in 8 bits",
            _loop(optim="sparse_adamw_8bit"),
        )
    if args.values_dtype == "float32":
        yield (
            "values_dtype=bfloat16, with stochastic rounding",
            _run(values_dtype="bfloat16"),
        )
    if sft.gradient_accumulation_steps == 1 and not sft.optim_in_backward:
        yield (
            "optim_in_backward=true and max_grad_norm=0, no gradient clipping",
            _loop(optim_in_backward=True, max_grad_norm=0.0),
        )
    if not args.quantize_ends:
        yield (
            "quantize_ends=true, embedding and head in INT8",
            _run(quantize_ends=True),
        )
    if cuda and not sft.activation_offloading:
        yield (
            "activation_offloading=true, costs transfers to the CPU",
            _loop(activation_offloading=True),
        )
    if cuda and not args.embedding_on_cpu and not _tied(args):
        yield (
            "embedding_on_cpu=true, rows are looked up on the CPU",
            _run(embedding_on_cpu=True),
        )
    batch, accumulate = sft.per_device_train_batch_size, sft.gradient_accumulation_steps
    while batch > 1:
        accumulate *= 2 if batch % 2 == 0 else batch
        batch = batch // 2 if batch % 2 == 0 else 1
        yield _shorter(batch, accumulate)
    density = args.density
    while args.rank_budget is None and density > LEAST_DENSITY:
        density = max(LEAST_DENSITY, density / 2)
        yield _sparser(density)


def _run(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda settings: (replace(settings[0], **changes), settings[1])


def _loop(**changes: Any) -> Callable[[Settings], Settings]:
    return lambda settings: (settings[0], replace(settings[1], **changes))


def _smaller_evaluation(batch: int) -> tuple[str, Callable[[Settings], Settings]]:
    return (
        f"per_device_eval_batch_size={batch}, the same evaluation in smaller batches",
        _loop(per_device_eval_batch_size=batch),
    )


def _shorter(batch: int, accumulate: int) -> tuple[str, Callable[[Settings], Settings]]:
    changes = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulate,
        "optim_in_backward": False,  # cannot go with accumulation
    }
    return (
        f"per_device_train_batch_size={batch} with gradient_accumulation_steps={accumulate}, "
        "the same batch in more pieces; no optim_in_backward",
        _loop(**changes),
    )


def _sparser(density: float) -> tuple[str, Callable[[Settings], Settings]]:
    return (
        f"density={density:g}, fewer trained entries: this costs quality",
        _run(density=density),
    )


def _tied(args: RunArguments) -> bool:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(
        args.model_name_or_path, revision=args.model_revision, trust_remote_code=False
    )
    return bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
