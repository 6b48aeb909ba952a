"""What a run leaves to be reported, but for its adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GIB = 2**30

MEMORY: dict[str, Any] = {
    "device": "NVIDIA GeForce RTX 3060",
    "phases": {
        "load": {"seconds": 41.3, "tensors": 4 * GIB, "reserved": 4 * GIB, "resident": None},
        "select": {"seconds": 93.0, "tensors": 4.5 * GIB, "reserved": 5 * GIB, "resident": None},
        "train": {"seconds": 7512.0, "tensors": 6.5 * GIB, "reserved": 7 * GIB, "resident": None},
        "export": {"seconds": 80.0, "tensors": 2 * GIB, "reserved": 3 * GIB, "resident": None},
    },
    "categories": {
        "base weights": 3.112 * GIB, "embeddings and head": 0.488 * GIB, "norms and other": 600_000,
        "index": 0.327 * GIB, "values": 0.603 * GIB, "retired entries": 0.1 * GIB,
        "gradients": 0.603 * GIB, "optimizer state": 0.613 * GIB, "scratch": 0,
        "activations and workspace": 0.65 * GIB,
    },
    "entries": 323_800_000,
    "notes": ["selection: 224 matrices in 93.0 s, all converged.", "refresh: 2 in 9 s."],
    "plan": {
        "categories": {
            "base weights": 3.112 * GIB, "embeddings and head": 0.488 * GIB,
            "norms and other": 600_000, "index": 0.327 * GIB, "values": 0.603 * GIB,
            "retired entries": 0.3 * GIB, "gradients": 0.603 * GIB, "optimizer state": 0.613 * GIB,
            "scratch": 0, "activations and workspace": 0.62 * GIB,
        },
        "phases": {"load": 4 * GIB, "select": 4.4 * GIB, "train": 6.67 * GIB, "export": GIB},
    },
    "capacity": 12 * GIB,
    "versions": {"python": "3.12.4", "torch": "2.13.0"},
}  # fmt: skip
STATE: dict[str, Any] = {
    "global_step": 800,
    "log_history": [
        {"step": 0, "eval_loss": 1.62},
        *({"step": s, "loss": 0.7 + 1.6 / (1 + s / 90), "learning_rate": 2e-4 * (1 - s / 900)}
          for s in range(50, 801, 50)),
        {"step": 300, "refresh_churn": 0.124, "refresh_retired": 40_100_000,
         "refresh_held_back": 0, "refresh_seconds": 4.0},
        {"step": 600, "refresh_churn": 0.052, "refresh_retired": 55_300_000,
         "refresh_held_back": 0, "refresh_seconds": 4.0},
        {"step": 800, "eval_loss": 0.913},
        {"step": 800, "train_runtime": 7512.0, "train_loss": 1.0},
    ],
}  # fmt: skip
SETTINGS = {
    "leanlift_version": "0.1.0", "model_name_or_path": "Qwen/Qwen2.5-7B",
    "dataset_name": "rows.json",
    "density": 0.05, "learning_rate": 2e-4, "max_length": 2048, "target_modules": "all-linear",
    "eval_dataset_name": "held.json", "density_pattern": None,
    "kept": [
        {"name": "prose.txt", "rows": 120, "tokens": 122_000, "before": 2.3142, "after": 2.3495,
         "change": 0.0353, "error": 0.0041},
        {"name": "code.txt", "rows": 64, "tokens": 64_300, "before": 1.2042, "after": 1.1991,
         "change": -0.0051, "error": None},
    ],
}  # fmt: skip
ANSWERS = {
    "prompt": "next 48219 -> ", "expected": "59320",
    "answers": {"before": "48219", "after": "59320"}, "right": {"before": False, "after": True},
}  # fmt: skip


def whole(data: Any) -> Any:
    """The same with sizes as the integers that they are on disk."""
    if isinstance(data, dict):
        return {key: value if key == "seconds" else whole(value) for key, value in data.items()}
    return int(data) if isinstance(data, float) else data


def put(run: Path, **changes: Any) -> Path:
    """A run's directory without an adapter."""
    run.mkdir(exist_ok=True)
    parts = {
        "memory.json": whole(MEMORY), "trainer_state.json": STATE, "run.json": SETTINGS,
        "predictions.jsonl": ANSWERS, **changes,
    }  # fmt: skip
    for name, data in parts.items():
        if data is not None:
            (run / name).write_text(json.dumps(data) + "\n")
    return run
