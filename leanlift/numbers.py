"""What the numbers of a training loop may be; looked at first, so nothing heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from leanlift.errors import UserError

TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")
"""What a switch may be."""

Test = Callable[[float], bool]
AT_LEAST_1: tuple[str, Test] = ("at least 1", lambda value: value >= 1)
NOT_NEGATIVE: tuple[str, Test] = ("0 or more", lambda value: value >= 0)
POSITIVE: tuple[str, Test] = ("more than 0", lambda value: value > 0)
SHARE: tuple[str, Test] = ("in [0, 1)", lambda value: 0 <= value < 1)

NUMBERS: dict[str, tuple[str, Test]] = {
    "per_device_train_batch_size": AT_LEAST_1,
    "per_device_eval_batch_size": AT_LEAST_1,
    "gradient_accumulation_steps": AT_LEAST_1,
    "max_steps": (
        "at least 1, or -1 for num_train_epochs",
        lambda value: value >= 1 or value == -1,
    ),
    "num_train_epochs": POSITIVE,
    "max_length": AT_LEAST_1,
    "learning_rate": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "warmup_steps": NOT_NEGATIVE,
    "label_smoothing_factor": SHARE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "save_steps": POSITIVE,
    "save_total_limit": AT_LEAST_1,
    "dataset_num_proc": AT_LEAST_1,
    "dataloader_num_workers": NOT_NEGATIVE,
    "eval_accumulation_steps": AT_LEAST_1,
    "torch_empty_cache_steps": AT_LEAST_1,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "pad_to_multiple_of": AT_LEAST_1,
    "max_nonfinite_steps": AT_LEAST_1,
}
"""What the numbers of a training loop may be; those whose default is none may be none."""

WHOLE = (
    "_size",
    "_num_proc",
    "_workers",
    "max_length",
    "max_steps",
    "_limit",
    "accumulation_steps",
    "nonfinite_steps",
)
"""Endings of names of whole numbers."""


def check_number(name: str, value: Any) -> None:
    """Hold a number against `NUMBERS`; "auto" is none.

    Raises:
        UserError: no number, not finite, or out of range.
    """
    if value == "auto":
        return
    what, holds = NUMBERS[name]
    kinds = (int,) if name.endswith(WHOLE) else (int, float)
    number = isinstance(value, kinds) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or not holds(value):
        kind = "whole number" if name.endswith(WHOLE) else "number"
        raise UserError(f"expected {name} as a {kind}, {what}; got {value!r}.")
