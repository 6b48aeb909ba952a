"""The plan of a run: what its arguments, and the lengths of its rows, come to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from leanlift.config import TARGET_PRESETS, LiftConfig
from leanlift.errors import UserError, first_line
from leanlift.fingerprint import Layout
from leanlift.format import name_of, size
from leanlift.methods import REWARD_HEAD
from leanlift.model.blocks import inside_language
from leanlift.model.kept_blocks import check_kept_blocks
from leanlift.model.stacks import named_parts, stack_shapes
from leanlift.model.stream_state import check_used_once
from leanlift.model.streaming import layers_by_block
from leanlift.model.targets import beyond_text, find_targets
from leanlift.model.tiled import check_fused, tiled_mlp
from leanlift.model.whole import check_growth_beside, whole_modules
from leanlift.plan import (
    Batch,
    FakeBase,
    Known,
    MemoryPlan,
    Planned,
    PlanSettings,
    least_nbytes,
    plan_memory,
    shapes_of,
)
from leanlift.plan.auto import how_loaded
from leanlift.plan.fake import fake_tensors
from leanlift.plan.keeping import kept_plan, key_of
from leanlift.source import layout_in
from leanlift.training.arguments import (
    LiftSFTConfig,
    RunArguments,
    planned_loop,
    trains_on_gpu,
)
from leanlift.training.batches import Batches, largest_allowed
from leanlift.training.loss import NAME_OTHERS, objective_of
from leanlift.weights.kinds import is_turned_linear, matrix_of

logger = logging.getLogger("leanlift")


def plan_of(
    args: RunArguments,
    sft: LiftSFTConfig,
    cuda: bool | None = None,
    batches: Batches | None = None,
    known: Known | None = None,
) -> MemoryPlan:
    """The plan of a run with these arguments.

    Args:
        args, sft: of the run.
        cuda: whether it is on a GPU; None: where the arguments have it on this machine.
        batches: its largest ones; what is None there is as large as the arguments allow.
        known: as in `plan_memory`.
    """
    images = batches is not None and batches.images
    config, objective = planned_mask(args), objective_of(sft)
    settings = plan_settings(args, sft, cuda, batches or Batches())
    plan = kept_plan(
        lambda: key_of(_base(args, sft, images), config, settings, objective, args.method),
        lambda: plan_memory(
            args.model_name_or_path,
            config,
            settings,
            args.attn_implementation,
            bool(sft.trust_remote_code),
            objective,
            args.model_revision,
            known,
            images,
            args.method,
        ),
    )
    template = getattr(sft, "chat_template_path", None)
    if template is not None and not Path(template).expanduser().is_file():
        plan.notes.append(
            "rows that the embedding may get for tokens of chat_template_path are not counted."
        )
    return plan


def least_of(args: RunArguments, sft: LiftSFTConfig, cuda: bool | None = None) -> tuple[int, str]:
    """What a run needs without its activations, in bytes, and when; see `least_nbytes`."""
    return least_nbytes(_planned(args, sft, cuda))


def targets_of(
    args: RunArguments, sft: LiftSFTConfig, images: bool = False
) -> dict[str, tuple[int, int]]:
    """The matrices that a run trains, and their shapes."""
    return shapes_of(_planned(args, sft, False, images)).targets


def check_growth(
    args: RunArguments, sft: LiftSFTConfig, rows: int | None, images: bool = False
) -> None:
    """Refuse a vocabulary that grows to so many rows under a head that is trained whole; where the
    model cannot be made without its weights, attaching to it says so.

    Raises:
        UserError: it would.
    """
    config = planned_mask(args)
    if rows is None or not config.modules_to_save:
        return
    with fake_tensors():
        try:
            model = _planned(args, sft, False, images).build()
        except UserError:
            return
        check_growth_beside(model, whole_modules(model, config), rows)


def check_reached(args: RunArguments, sft: LiftSFTConfig) -> None:
    """Refuse targets that rows of text give no gradient, all of them: named matrices of a tower.
    Where the model cannot be made without its weights, the first tokens say so.

    Raises:
        UserError: they are that, or no targets.
    """
    config = planned_mask(args)
    beside = config.modules_to_save or config.trainable_token_indices
    if beside or config.target_modules in TARGET_PRESETS:
        return
    base = _base(args, sft)
    if how_loaded(base.shape, True) is None:
        return
    with fake_tensors():
        try:
            model = base.build(plan_settings(args, sft, False, Batches()))
        except UserError:
            return
        found = find_targets(model, config.target_modules, config.exclude_modules, config.selects)
        beyond, language = beyond_text(model, found), inside_language(named_parts(model))
    if beyond is not None and language.isdisjoint(found):
        raise UserError(f"{beyond} {NAME_OTHERS}")


def check_memory_settings(args: RunArguments, sft: LiftSFTConfig, images: bool = False) -> None:
    """Refuse settings of the memory that cannot be had.

    Raises:
        UserError: they cannot, of this model or with these settings.
    """
    check_streaming(args, sft)
    if sft.kept_blocks:
        _try_on(args, sft, images, partial(check_kept_blocks, count=sft.kept_blocks))
    if args.tiled_mlp:
        check_tiled(args, sft, images)
    if args.fused_elementwise:
        _try_on(args, sft, images, check_fused)
    if args.stream_base:
        _try_on(args, sft, images, layers_by_block)
    if args.stream_state:
        _try_on(args, sft, images, check_used_once)


def check_tiled(args: RunArguments, sft: LiftSFTConfig, images: bool = False) -> None:
    """Refuse MLPs that shall be tiled where none can be.

    Raises:
        UserError: none can.
    """
    _try_on(args, sft, images, tiled_mlp)


def _try_on(
    args: RunArguments, sft: LiftSFTConfig, images: bool, check: Callable[[Any], object]
) -> None:
    """Check a model that has no numbers; where none can be made, whoever attaches to it says so."""
    with fake_tensors():
        try:
            model = _planned(args, sft, False, images).build()
        except UserError:
            return
        check(model)


def can_be_tiled(args: RunArguments, sft: LiftSFTConfig) -> bool:
    """Whether a run's model has MLPs that can be tiled, as far as can be told without weights."""
    try:
        check_tiled(args, sft)
    except UserError:
        return False
    return True


def layout_of_base(
    args: RunArguments, sft: LiftSFTConfig, checkpoint: Path, images: bool = False
) -> Layout:
    """Where the tensors of a run's model are in its checkpoint, by a model without contents."""
    with fake_tensors():
        model = _planned(args, sft, False, images).build()
        live = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        turned = {
            f"{name}.weight": tuple(matrix_of(module).shape)
            for name, module in model.named_modules()
            if is_turned_linear(module)
        }
    return layout_in(model, checkpoint, live, stack_shapes(model), turned)


def is_tied(args: RunArguments, sft: LiftSFTConfig) -> bool:
    """Whether the embedding and the output head of a run's base are one tensor."""
    return _base(args, sft).tied


def _base(args: RunArguments, sft: LiftSFTConfig, images: bool = False) -> FakeBase:
    return FakeBase.of(
        args.model_name_or_path,
        args.attn_implementation,
        bool(sft.trust_remote_code),
        args.model_revision,
        images,
    )


def _planned(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool | None, images: bool = False
) -> Planned:
    settings = plan_settings(args, sft, cuda, Batches())
    return _base(args, sft, images).planned(planned_mask(args), settings)


def planned_mask(args: RunArguments) -> LiftConfig:
    """What is trained, but for the head of a reward model, which a plan's model has not: a row."""
    config = args.lift_config()
    if args.method != "reward":
        return config
    whole = config.modules_to_save
    names = (whole,) if isinstance(whole, str) else whole
    return replace(config, modules_to_save=tuple(n for n in names if n != REWARD_HEAD))


def check_streaming(args: RunArguments, sft: LiftSFTConfig) -> None:
    """Refuse streamed state without what it needs.

    Raises:
        UserError: its blocks are not streamed, or gradients wait for a step at the end.
    """
    if args.stream_state and not (args.stream_base and sft.optim_in_backward):
        raise UserError(
            "stream_state updates what is learned while its block is on the device: set "
            "stream_base, optim_in_backward, a sparse_adamw optim and max_grad_norm=0 too, or "
            "leave it out."
        )


def plan_settings(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool | None, batches: Batches
) -> PlanSettings:
    """What decides the memory of a run, of its arguments.

    Raises:
        UserError: state that is streamed without what it needs.
    """
    check_streaming(args, sft)
    sft = planned_loop(args, sft)
    eval_packing = sft.packing if sft.eval_packing is None else sft.eval_packing
    train = batches.train or largest_allowed(sft.per_device_train_batch_size, sft, sft.packing)
    strategy = name_of(sft.eval_strategy)
    evaluates = args.eval_dataset_name or strategy != "no"
    size = sft.per_device_eval_batch_size if evaluates else 1  # rows to keep go one by one
    evaluation = batches.eval or largest_allowed(size, sft, evaluates and eval_packing)
    if args.eval_dataset_name or args.keep_dataset_name:  # before and after training at least
        strategy = "steps"
    return PlanSettings(
        per_device_train_batch_size=sft.per_device_train_batch_size,
        max_length=sft.max_length,
        gradient_accumulation_steps=sft.gradient_accumulation_steps,
        gradient_checkpointing=bool(sft.gradient_checkpointing),
        kept_blocks=sft.kept_blocks if sft.gradient_checkpointing else 0,
        reuse_weights=bool(sft.reuse_weights and sft.gradient_checkpointing),
        activation_offloading=bool(sft.activation_offloading),
        optim=name_of(sft.optim),
        optim_in_backward=sft.optim_in_backward,
        eval_strategy=strategy,
        per_device_eval_batch_size=sft.per_device_eval_batch_size,
        load_in_4bit=args.load_in_4bit,
        load_in_8bit=args.load_in_8bit,
        bnb_4bit_quant_type=args.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=args.bnb_4bit_use_double_quant,
        dtype=args.dtype,
        embedding_on_cpu=args.embedding_on_cpu,
        stream_base=args.stream_base,
        stream_state=args.stream_state,
        tiled_mlp=args.tiled_mlp,
        mlp_tokens=args.mlp_tokens,
        fused_elementwise=args.fused_elementwise,
        cuda=trains_on_gpu(sft) if cuda is None else cuda,
        largest=train,
        largest_eval=evaluation,
    )


def plan_of_what_was_measured(
    args: RunArguments,
    sft: LiftSFTConfig,
    cuda: bool,
    plan: MemoryPlan,
    worst: Batches,
    largest: Batch | None,
) -> MemoryPlan:
    """The plan for the largest batch of the steps that were measured, and what it says of that.

    Args:
        args, sft, cuda: of the run.
        plan: the one that was made before it, for the batches `worst`.
        largest: the largest batch in what was measured; None: not known.
    """
    if largest is not None and worst.train is not None and largest.seen is None:
        largest = _seen_before(largest, worst.train)
    if largest is None or largest == worst.train:
        return plan
    try:
        made = plan_of(args, sft, cuda, Batches(largest, worst.eval, worst.images))
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("What was measured could not be planned: %s", first_line(error))
        return plan
    was = f"for {worst.train}, the largest batch that could occur," if worst.train else "before it"
    made.notes.append(
        f"planned: for {largest}, the largest batch among the steps measured; {was} the run was "
        f"planned to peak at {size(plan.peak)}."
    )
    return made


def _seen_before(largest: Batch, planned: Batch) -> Batch | None:
    """A batch of a card, whose images nobody has looked at, with those that were planned for; None:
    its rows are shorter than these."""
    if planned.seen is None:
        return largest
    seen, tokens = planned.seen, planned.seen.tokens
    return replace(largest, seen=seen) if largest.tokens >= tokens else None
