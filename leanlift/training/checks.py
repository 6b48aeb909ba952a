"""Settings that cannot be meant, or that could not be kept, refused before anything is loaded.

Three kinds. Numbers outside of what they count. Settings of TRL's and Trainer's that would do
nothing to a leanlift model, or something else than they say. Packages that a setting needs. Each
ends in one sentence; most of them would otherwise end a run after minutes of loading, in another
library's words, or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks

from leanlift.config import LiftConfig
from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError, first_line
from leanlift.format import name_of
from leanlift.optim import check_remappable
from leanlift.settings import NUMBERS

__all__ = ["NUMBERS", "SPARSE_OPTIMIZERS", "check_numbers", "check_settings"]

LEFT_OUT = object()
"""A setting that this version of the library, or this kind of config, has not."""


def check_language_model(model: Any) -> None:
    """Refuse a model without logits over a vocabulary, such as a classifier.

    Raises:
        UserError: it is none that LiftTrainer trains.
    """
    if getattr(model, "get_output_embeddings", lambda: model)() is None:
        raise UserError(
            f"LiftTrainer trains on the next token, which a {type(model).__name__} has no head "
            "for: train it with transformers' Trainer, save_strategy=no and save_adapter after it."
        )


def check_numbers(sft: Any) -> None:
    """Hold the numbers of an SFTConfig against `NUMBERS`.

    Raises:
        UserError: one that is no number, not finite, or out of range.
    """
    for name, kind in NUMBERS.items():
        value: Any = getattr(sft, name, LEFT_OUT)
        if value is not LEFT_OUT:
            kind.check(name, value)


def check_settings(sft: Any, config: LiftConfig, by_name: bool = True) -> None:
    """Refuse settings that a run could not keep.

    Args:
        sft: an SFTConfig.
        config: what is trained.
        by_name: whether the optimizer is the one that `optim` names, not an object of the user's.

    Raises:
        UserError: there is one; says which and what to do instead.
    """
    for wrong, advice in _unsupported(sft, config):
        raise UserError(f"{wrong} {advice}.")
    if by_name:
        _check_optimizer(sft, config)
        _check_schedule(sft)
    _check_reporting(sft)


def _unsupported(sft: Any, config: LiftConfig) -> Iterator[tuple[str, str]]:
    """Settings that would do nothing, or not what they say, with what to do."""
    if sft.output_dir == "":
        yield "output_dir is an empty text:", "name a directory, or leave it out"
    if getattr(sft, "use_liger_kernel", False):
        yield (
            "use_liger_kernel puts other forwards in place of leanlift's:",
            "leave it out, and set fused_elementwise for Liger's kernels within leanlift's",
        )
    yield from _cut_into_parts(sft)
    if getattr(sft, "model_init_kwargs", None):
        yield (
            "model_init_kwargs would be ignored: the base is loaded already, or from keys such as "
            "dtype and attn_implementation:",
            "use those",
        )
    if getattr(sft, "optim_target_modules", None):
        yield (
            "optim_target_modules belongs to optimizers over matrices, and leanlift's parameters "
            "are vectors:",
            "leave it out, and name what is trained with target_modules",
        )
    if getattr(sft, "load_best_model_at_end", False) and name_of(sft.eval_strategy) == "no":
        yield (
            "load_best_model_at_end needs evaluations to tell the best by:",
            "set eval_strategy and eval_dataset_name, or leave it out",
        )
    if getattr(sft, "do_predict", False):
        yield "do_predict does nothing in a training run:", "use leanlift eval"
    if getattr(sft, "loss_type", "nll") == "dft" and getattr(sft, "label_smoothing_factor", 0):
        yield "loss_type=dft has no label smoothing:", "leave one of the two out"
    if getattr(sft, "push_to_hub", False):
        yield (
            "push_to_hub would upload checkpoints and run.json while training goes on:",
            "train without it, then publish the adapter with leanlift push",
        )
    if getattr(sft, "torch_compile", False):
        yield "torch_compile has no effect on trained layers and their loss:", "leave it out"
    if getattr(sft, "optim_in_backward", False) and getattr(sft, "auto_find_batch_size", False):
        yield (
            "auto_find_batch_size begins anew, and optim_in_backward has changed offsets by then:",
            "set per_device_train_batch_size, or let --fit choose",
        )
    if config.values_dtype != "float32" and getattr(sft, "fp16", False):
        yield (
            f"fp16 scales its loss, which {config.values_dtype} values cannot be trained with:",
            "use bf16, or values_dtype=float32",
        )


def _cut_into_parts(sft: Any) -> Iterator[tuple[str, str]]:
    """Settings, of the run or of accelerate's launcher, by which no process has the whole model."""
    if getattr(sft, "fsdp", None) or getattr(sft, "deepspeed", None):
        name = "fsdp" if getattr(sft, "fsdp", None) else "deepspeed"
        yield (
            f"{name} cuts a model into parts, and leanlift keeps the whole base in each process:",
            "leave it out, and let accelerate launch start a process per GPU (--multi_gpu)",
        )
    if getattr(sft, "parallelism_config", None) is not None:
        yield (
            "parallelism_config spreads a model over GPUs, and leanlift trains on one:",
            "leave it out",
        )
    for name, what in (("FSDP", "fsdp"), ("DEEPSPEED", "deepspeed"), ("MEGATRON_LM", "megatron")):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() == "true":
            yield (
                f"accelerate's configuration asks for {what}, which cuts a model into parts, and "
                "leanlift keeps the whole base in each process:",
                "start it with accelerate launch --multi_gpu",
            )
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() == "true":
        yield (
            "accelerate's configuration asks for tensor or context parallelism, which leanlift "
            "does not do:",
            "start it with accelerate launch --multi_gpu",
        )


def _check_optimizer(sft: Any, config: LiftConfig) -> None:
    """Make the optimizer once, over one entry: whether its package is there, and its state can
    follow what training does to the entries."""
    name = name_of(sft.optim)
    if name in SPARSE_OPTIMIZERS:
        return
    check_rounding(f"optim={name}", config.values_dtype)
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(sft)
        optimizer = kind([nn.Parameter(torch.zeros(1))], **options)
    except UserError:
        raise
    except Exception as error:  # each optimizer has its own way to miss a package or a setting
        raise UserError(
            f"optim={name} cannot be used: {first_line(error).rstrip('.')}; use adamw_torch, "
            "adamw_8bit, sparse_adamw or sparse_adamw_8bit."
        ) from None
    if config.refresh_interval:
        check_remappable(optimizer)


def check_rounding(name: str, values_dtype: str) -> None:
    """Refuse values that an optimizer other than `SparseAdamW` would not move.

    Raises:
        UserError: they have 16 bits.
    """
    if values_dtype != "float32":
        raise UserError(
            f"{name} rounds small updates of {values_dtype} values away: use "
            f"optim={' or '.join(SPARSE_OPTIMIZERS)}, or values_dtype=float32."
        )


def _check_schedule(sft: Any) -> None:
    """Make the schedule once: whether it is one, and takes its settings."""
    name, options = sft.lr_scheduler_type, sft.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    try:
        get_scheduler(
            name,
            optimizer,
            num_warmup_steps=0,
            num_training_steps=10,
            scheduler_specific_kwargs=options,
        )
    except Exception as error:  # each schedule has its own way to miss a setting
        raise UserError(
            f"lr_scheduler_type={getattr(name, 'value', name)} with lr_scheduler_kwargs="
            f"{options!r:.100} cannot be used: {first_line(error)}"
        ) from None


def _check_reporting(sft: Any) -> None:
    """Make the callbacks of `report_to` once: whether their packages are there."""
    wanted = sft.report_to
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    try:
        for callback in get_reporting_integration_callbacks([n for n in names if n != "none"]):
            callback()
    except Exception as error:  # whatever a package of somebody's does when it is not there
        raise UserError(
            f"report_to={', '.join(names)} cannot be used: {first_line(error).rstrip('.')}; "
            "install the package, or set report_to=none."
        ) from None
