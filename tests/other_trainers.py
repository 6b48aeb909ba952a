"""TRL's trainers over a tiny model, made as its documentation makes them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trl
from datasets import Dataset
from tiny import make_tokenizer

from leanlift import LiftCallback

PAIRS = [{"prompt": f"{i} plus {i} is ", "chosen": str(2 * i), "rejected": str(2 * i + 1)}
         for i in range(24)]  # fmt: skip


def length(completions: list[str], **more: Any) -> list[float]:
    return [float(len(text) + index % 3) for index, text in enumerate(completions)]


def rows_of(method: str) -> Dataset:
    """The same small sums as each trainer takes them."""
    made: dict[str, Callable[[int, dict[str, str]], dict[str, Any]]] = {
        "sft": lambda i, row: {"prompt": row["prompt"], "completion": row["chosen"]},
        "kto": lambda i, row: {
            "prompt": row["prompt"],
            "completion": row["chosen" if i % 2 else "rejected"],
            "label": bool(i % 2),
        },
        "grpo": lambda i, row: {"prompt": row["prompt"]},
        "rloo": lambda i, row: {"prompt": row["prompt"]},
    }
    return Dataset.from_list(
        [made.get(method, lambda i, row: row)(i, r) for i, r in enumerate(PAIRS)]
    )


def arguments(method: str, output: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "max_steps": 4,
        "per_device_train_batch_size": 2, "learning_rate": 1e-2, "report_to": "none",
        "logging_steps": 1, "save_steps": 3, "disable_tqdm": True, "gradient_checkpointing": False,
        **changes,
    }  # fmt: skip
    if method in ("grpo", "rloo"):
        return {**given, "beta": 0.1, "num_generations": 2, "max_completion_length": 6,
                "temperature": 1.0}  # fmt: skip
    return {**given, "max_length": 32}


def make(method: str, model: Any, output: Path, callbacks: Any = None, **changes: Any) -> Any:
    """A trainer of TRL's, as its documentation makes it."""
    given = arguments(method, output, **changes)
    more: dict[str, Any] = {"reward_funcs": length} if method in ("grpo", "rloo") else {}
    kinds: dict[str, tuple[Any, Any]] = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "kto": (trl.KTOTrainer, trl.KTOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }
    if method in ("orpo", "cpo"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import trl.experimental.cpo as cpo
            import trl.experimental.orpo as orpo
        kinds["orpo"] = orpo.ORPOTrainer, orpo.ORPOConfig
        kinds["cpo"] = cpo.CPOTrainer, cpo.CPOConfig
        given["remove_unused_columns"] = False
    trainer, config = kinds[method]
    return trainer(
        model=model,
        args=config(**given),
        train_dataset=rows_of(method),
        processing_class=make_tokenizer(),
        callbacks=[LiftCallback()] if callbacks is None else callbacks,
        **more,
    )
