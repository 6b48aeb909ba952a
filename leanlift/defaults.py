"""What the command line takes where nothing is said. Nothing heavy is imported: help shows it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leanlift.methods import REWARD_HEAD

SPARSE_OPTIMIZERS = {"sparse_adamw": "float32", "sparse_adamw_8bit": "8bit"}
"""Names of `SparseAdamW` for `optim`, and the moments it keeps."""

MICRO_BATCH, BATCH = 1, 8
"""Rows at a time, and of a step: what a 7B model on one card has room for, and what TRL takes."""


def default_dtype(cuda: bool) -> str:
    """The dtype of what is not quantized, where none is asked for."""
    return "bfloat16" if cuda else "float32"


def _of_the_method(method: str) -> dict[str, Any]:
    """What a method other than imitation takes where nothing is said. Reinforcement learning moves
    weights that are not principal (arXiv 2511.08567), and a random hundredth of them does as well
    as all (arXiv 2602.01599); KTO compares the rows of a batch; a reward model has a new head."""
    if method in ("grpo", "rloo"):
        return {"selector": "random"}
    if method == "kto":
        return {"per_device_train_batch_size": 2}
    return {"modules_to_save": (REWARD_HEAD,)} if method == "reward" else {}


def command_defaults(given: Mapping[str, Any]) -> dict[str, Any]:
    """What `leanlift train`, `plan` and `init` take where nothing is said: what is leanest at no
    measured cost. Moments in 8 bits; offsets in 16, which the optimizer rounds stochastically, on
    a CPU too; one row at a time, eight to a step.

    They are the command's and not those of the classes: in Python, `LiftConfig` and `LiftSFTConfig`
    may meet any trainer and any optimizer, which fp32 offsets and torch's AdamW go with.

    Args:
        given: what was said, by key. What cannot go with a default changes it: another optimizer
            or fp16 take fp32 offsets; one size of a batch leaves the other at 1, as everywhere.
    """
    optim = given.get("optim") or "sparse_adamw_8bit"
    lean = str(getattr(optim, "value", optim)) in SPARSE_OPTIMIZERS and not given.get("fp16")
    found: dict[str, Any] = {
        "optim": "adamw_torch" if given.get("fp16") else "sparse_adamw_8bit",
        "values_dtype": "bfloat16" if lean else "float32",
    }
    sizes = {"per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size"}
    if not sizes & given.keys() and not given.get("optim_in_backward"):
        found["gradient_accumulation_steps"] = BATCH // MICRO_BATCH
    if "auto_find_batch_size" not in given:
        found["per_device_train_batch_size"] = MICRO_BATCH
    if given.get("eval_dataset_name"):
        found["eval_strategy"] = "epoch"
    found |= _of_the_method(str(given.get("method")))
    return {key: value for key, value in found.items() if key not in given}
