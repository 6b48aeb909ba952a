"""What `LiftTrainer` makes of the arguments, optimizer and tokenizer that it is given."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from trl import SFTConfig

from leanlift.data.images import load_processor, sees
from leanlift.data.tokenizer import load_tokenizer
from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.model import LiftState
from leanlift.model.base import check_checkpointing
from leanlift.model.kept_blocks import check_kept_blocks
from leanlift.optim import SparseAdamW, check_remappable, unwrap
from leanlift.plan.auto import how_loaded
from leanlift.processes import launched, processes
from leanlift.training.arguments import LiftSFTConfig
from leanlift.training.checks import check_rounding
from leanlift.training.run_overrides import use_one_gpu

logger = logging.getLogger("leanlift")


def several_processes(args: SFTConfig) -> None:
    """A process per GPU, each with rows of its own and nothing to dispatch; accelerate would cut
    all tensors of a batch to its rows, the positions of trained tokens among them.

    Raises:
        UserError: activations are to be moved to the CPU by a run on the CPU; a launcher has
            started several processes that do not talk to each other; or each of several processes
            would add gradients up for an update in the backward pass.
    """
    if args.device.type and launched() != processes():  # the device says how they talk
        raise UserError(
            f"the environment says that there are {launched()} processes (WORLD_SIZE), and "
            f"{processes()} talk to each other: start them with accelerate launch or torchrun, or "
            "unset WORLD_SIZE, RANK and LOCAL_RANK."
        )
    accumulates = getattr(args, "gradient_accumulation_steps", 1) > 1
    if processes() > 1 and accumulates and getattr(args, "optim_in_backward", False):
        raise UserError(
            "optim_in_backward with several processes takes one micro-batch a step: set "
            "gradient_accumulation_steps=1, or leave optim_in_backward out, which saves nothing "
            "where gradients are added up."
        )
    if getattr(args, "activation_offloading", False) and args.device.type == "cpu":
        raise UserError(
            "activation_offloading moves activations from a GPU to the CPU, and this run is on "
            "the CPU: leave it out."
        )
    one_gpu(args)
    args.accelerator_config.dispatch_batches = False


def one_gpu(args: Any) -> None:
    """One GPU for this process. Trainer would take all, and replicate the model in threads whose
    layers share what they compute in."""
    if args.n_gpu > 1:
        logger.warning(
            "Training on one GPU, %s, of %d: for all of them, start with accelerate launch.",
            args.device,
            args.n_gpu,
        )
        use_one_gpu(args)


def with_optimizer(args: SFTConfig, given: dict[str, Any], ops: str) -> dict[str, Any]:
    """The trainer's further arguments, with the optimizer that `optim` names, if it is ours."""
    if args.optim not in SPARSE_OPTIMIZERS or given.get("optimizers", (None, None))[0] is not None:
        return given
    return {
        **given,
        "optimizer_cls_and_kwargs": (SparseAdamW, {**sparse_options(args), "ops": ops}),
    }


def check_optimizer(optimizer: Any, lift: LiftState) -> None:
    """Refuse an optimizer that cannot train what is attached.

    Raises:
        UserError: its state could not follow a refresh, or it rounds updates of bf16 values away.
    """
    if lift.config.refresh_interval:
        check_remappable(optimizer)
    kind = unwrap(optimizer)
    if not isinstance(kind, SparseAdamW):
        check_rounding(type(kind).__name__, lift.config.values_dtype)


def sparse_options(args: SFTConfig) -> dict[str, Any]:
    """The options of `SparseAdamW` that the training arguments describe."""
    return {
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
        "moments": SPARSE_OPTIMIZERS[args.optim],
        "seed": args.seed,
    }


def make_checkpointing_safe(model: Any, args: SFTConfig) -> None:
    """Non-reentrant by default; the reentrant kind needs an input that requires grad.

    Raises:
        UserError: the model has none.
    """
    if args.gradient_checkpointing:
        check_checkpointing(model)
        check_kept_blocks(model, getattr(args, "kept_blocks", 0))
    options = args.gradient_checkpointing_kwargs
    if not args.gradient_checkpointing or not options:
        return  # transformers' own default is non-reentrant
    options.setdefault("use_reentrant", False)
    if options["use_reentrant"]:
        model.enable_input_require_grads()


@contextmanager
def rows_done(args: SFTConfig, images: bool = False) -> Iterator[None]:
    """Hide from TRL's constructor what has been done by now: it would do it again, to tokenized
    rows and to an embedding that cannot grow. The auxiliary loss of a router, which is frozen, is
    off where nothing is said; TRL takes the configuration's coefficient there. Rows with images are
    not cut."""
    done: dict[str, Any] = {
        "chat_template_path": None,
        "eos_token": None,
        "assistant_only_loss": False,
    }
    if images:
        done["max_length"] = None
    if args.router_aux_loss_coef is None:
        done["router_aux_loss_coef"] = 0.0
    kept = {key: getattr(args, key) for key in done}
    for key, value in done.items():
        setattr(args, key, value)
    try:
        yield
    finally:
        for key, value in kept.items():
            setattr(args, key, value)


def as_sft_config(args: Any) -> SFTConfig:
    """Arguments as TRL's own: of `TrainingArguments` those that it has, as TRL takes them."""
    if args is None:
        return LiftSFTConfig()
    if isinstance(args, SFTConfig):
        return args
    return SFTConfig(**{**args.to_dict(), "hub_token": args.hub_token})


def processing_of(given: Any, model: Any, images: bool) -> tuple[Any, Any, bool]:
    """What TRL shall have for a processing class; the same where it is the processor of rows with
    images (None: they have none, or are for a model of text, which takes no notice of them); and
    whether the model takes more than text.

    Args:
        given: by the user; None: that of the base.
        model: an attached model.
        images: whether the rows have some.

    Raises:
        UserError: they do, the model sees, and what was given is no processor.
    """
    more_than_text = how_loaded(model.config, True) is not None
    images = images and more_than_text
    base = model.leanlift.base
    if given is None:
        given = (load_processor if images else load_tokenizer)(base.name, revision=base.revision)
    if images and not sees(given):
        raise UserError(
            "the rows have images, and the processing_class is no processor of images: give "
            "AutoProcessor.from_pretrained(…) of the base."
        )
    return given, given if images else None, more_than_text
