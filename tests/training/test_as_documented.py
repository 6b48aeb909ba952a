"""docs/trainers.md as it is printed, on a tiny base."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from processes import ROOT

from leanlift import load_adapter
from leanlift.defaults import command_defaults
from leanlift.methods import METHODS
from leanlift.model import lift_state

GUIDE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
TINY = {
    "refresh_interval=400": "refresh_interval=2",
    'DPOConfig(output_dir="run"': 'DPOConfig(output_dir="run", use_cpu=True, bf16=False',
    'TrainingArguments("run"': 'TrainingArguments("run", use_cpu=True',
    "Accelerator(": "Accelerator(cpu=True, ",
}
IDS = torch.arange(3, 27).reshape(4, 6)


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_every_block_runs_after_those_before_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But for what this size and a machine without a GPU ask for."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} and {i} is ", "chosen": str(2 * i), "rejected": "no"}
            for i in range(16)]  # fmt: skip
    batch = {"input_ids": IDS, "labels": IDS}
    names: dict[str, Any] = {
        "path": str(base), "pairs": Dataset.from_list(rows), "batch": {"input_ids": IDS},
        "tokenized": [{"input_ids": row, "labels": row} for row in IDS.tolist()] * 6,
        "batches": [batch] * 8,
    }  # fmt: skip
    refreshes = []
    for block in BLOCKS:
        for written, tiny in TINY.items():
            block = block.replace(written, tiny)
        exec(block, names)
        inner = names["model"]
        refreshes.append(lift_state(getattr(inner, "module", inner)).refreshes)
    assert refreshes == [2, 0, 4, 2, 0, 0]
    assert (tmp_path / "run" / "memory.json").is_file()
    assert load_adapter(names["base"], "adapter").active_adapter == "default"
    assert {path.name for path in (tmp_path / "three").iterdir()} >= {"second", "both"}


def test_the_table_of_methods_is_what_they_take() -> None:
    """Names, learning rates, and what the command takes by itself."""
    lines = [line for line in GUIDE.splitlines() if re.match(r"\| `sft` |\| `[a-z]+`.*2e-5", line)]
    told = {
        name: float(line.split("|")[2])
        for line in lines
        for name in re.findall(r"`([a-z]+)`", line.split("|")[1])
    }
    assert told == {name: method.learning_rate for name, method in METHODS.items()}
    common = set(command_defaults({}))
    more = {name: set(command_defaults({"method": name})) - common for name in METHODS}
    assert {name for name, keys in more.items() if keys == {"selector"}} == {"grpo", "rloo"}
    assert more["reward"] == {"modules_to_save"}
    assert command_defaults({"method": "kto"})["per_device_train_batch_size"] == 2
