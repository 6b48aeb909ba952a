"""Five models that are known to many, by the facts of their config.json that decide memory."""

from __future__ import annotations

from pathlib import Path

from leanlift.demo.ending import SEVEN_B

_HERE = Path(__file__).parent / "known"

KNOWN = {
    "Llama-2-7B": _HERE / "Llama-2-7B",
    "Mistral-7B": _HERE / "Mistral-7B",
    "Qwen2.5-7B": SEVEN_B,
    "Llama-3-8B": _HERE / "Llama-3-8B",
    "Qwen3-8B": _HERE / "Qwen3-8B",
}
"""Directories with a config.json and nothing else."""
