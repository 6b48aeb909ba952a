"""Real models at full width, cut to two layers: a whole run on a CPU, phase by phase.

    python -m benchmarks.two_layers [--models Qwen3-30B-A3B ...] [--work DIR]

For each of `MODELS` a checkpoint of random bf16 weights with the widths, the vocabulary and, of a
mixture, all the experts of `big_models.json`, stored as the family's checkpoints are. It is loaded
in NF4 as a run loads it, 5 % are selected, three real training steps of 128 tokens follow, a
refresh, and a merge onto the original in bf16, which stock transformers loads and `--verify`
compares. Per phase: seconds, the peak of live tensor bytes against the plan's, and that of
anonymous resident memory. What is mapped from files counts in neither; a plan of loading counts the
embedding and the head, too, which a card must hold.

Weights have a falling spectrum, as trained ones do. The step's plan is one without retired entries,
which there are only after the refresh; the refresh's has room for them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.big_models import MODELS as CONFIGS
from benchmarks.common import write_rows
from benchmarks.llama2_7b import Phases, random_tensor
from leanlift import LiftTrainer, get_lift_model, merge_adapter, refresh_mask, save_adapter
from leanlift.data.tokenizer import load_tokenizer
from leanlift.demo.run import BASE
from leanlift.evaluation.verify import verify_merged
from leanlift.layers import FrozenExperts, FrozenLinear
from leanlift.measure import static_categories
from leanlift.optim import state_nbytes
from leanlift.training import LiftSFTConfig, MemoryCallback, RunArguments, plan_of
from leanlift.training.base import load_model

TOKENS, STEPS = 128, 3
MODELS = ("Qwen3-30B-A3B", "Falcon-H1-7B")
"""A mixture, and a hybrid whose blocks have attention and a scan side by side."""


def write_checkpoint(name: str, path: Path) -> None:
    """A checkpoint as the family's own are, of random weights."""
    facts = {**CONFIGS[name]["config"], "num_hidden_layers": 2}
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(facts))
    config = AutoConfig.from_pretrained(path)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        matrices = parameter.data if parameter.dim() == 3 and "experts" in key else [parameter.data]
        for matrix in matrices if parameter.dim() in (2, 3) and min(parameter.shape) > 8 else ():
            matrix.copy_(random_tensor(tuple(matrix.shape), generator))
    model.save_pretrained(path)
    for file in BASE.glob("*token*"):
        shutil.copy(file, path)


def settings(work: Path) -> tuple[RunArguments, LiftSFTConfig]:
    """What the run is told: the command's defaults."""
    args = RunArguments(
        model_name_or_path=str(work / "base"), dataset_name="rows.json", dtype="bfloat16",
        values_dtype="bfloat16", refresh_interval=400,
    )  # fmt: skip
    sft = LiftSFTConfig(
        output_dir=str(work / "run"), use_cpu=True, bf16=False, optim="sparse_adamw_8bit",
        max_steps=STEPS, per_device_train_batch_size=1, max_length=TOKENS, save_strategy="no",
        logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    return args, sft


def run(name: str, work: Path) -> list[dict[str, Any]]:
    """The whole run over `work`'s base; one row per phase."""
    args, sft = settings(work)
    planned = plan_of(replace(args, refresh_interval=0), sft, cuda=False)
    plan = {
        **planned.phases,
        "refresh": plan_of(args, sft, cuda=False).phases["refresh"],
        "export": plan_of(args, sft, cuda=True).phases["export"],  # without the model on the GPU
        "verify": 0,
    }
    phases = Phases(plan)
    with phases.phase("load", follow=True):
        model = load_model(args, torch.device("cpu"))
    phases.rows[-1]["said"] = _held(model)
    held = sum(static_categories(model).values())
    with phases.phase("select", follow=True, static=held):
        get_lift_model(model, args.lift_config())
    phases.rows[-1]["said"] = f"{planned.entries:,} entries"
    memory = MemoryCallback(phases.meter)
    with phases.phase("train") as peak:
        trainer = LiftTrainer(
            model=model,
            args=sft,
            train_dataset=Dataset.from_list([{"text": "reverse abc is cba " * 60}] * STEPS),
            processing_class=load_tokenizer(args.model_name_or_path),
            callbacks=[memory],
        )
        trainer.train()
        peak.tensors = memory.peak
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    phases.rows[-1]["said"] = "losses " + ", ".join(f"{loss:.4f}" for loss in losses)
    static = sum(static_categories(model).values()) + state_nbytes(trainer.optimizer)
    with phases.phase("refresh", follow=True, static=static):
        report = refresh_mask(model, trainer.optimizer)
    phases.rows[-1]["said"] = f"churn {report.churn:.4f}"
    save_adapter(model, work / "adapter")
    del model, trainer, memory
    with phases.phase("export", follow=True):
        merged = merge_adapter(work / "adapter", work / "merged", dtype="bfloat16")
    phases.rows[-1]["said"] = f"{merged.merged} matrices, {merged.tensors} tensors"
    rows = work / "rows.jsonl"
    rows.write_text('{"text": "reverse abc is cba"}\n')
    with phases.phase("verify"):
        found = verify_merged(work / "adapter", merged, str(rows))
    phases.rows[-1]["said"] = str(found)
    phases.rows[-1]["planned GiB"] = ""
    return [{"model": name, **row} for row in phases.rows]


def _held(model: Any) -> str:
    experts = [m for m in model.modules() if isinstance(m, FrozenExperts)]
    held = sum(m.weight_tiles.format.held_nbytes(m.weight_tiles.shape) for m in experts)  # type: ignore[attr-defined]
    whole = sum(2 * math.prod(m.weight_tiles.shape) for m in experts)
    assert all(isinstance(m, FrozenLinear) for m in experts)
    return f"experts {held / 2**30:.3f} GiB, in 16 bits {whole / 2**30:.3f}" if experts else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--work", default="two-layers", help="8 GB at a time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    rows = []
    for name in arguments.models:
        work = Path(arguments.work) / name
        shutil.rmtree(work, ignore_errors=True)
        write_checkpoint(name, work / "base")
        rows += run(name, work)
        shutil.rmtree(work)
        print(f"Wrote {write_rows('two_layers', rows)}", flush=True)


if __name__ == "__main__":
    main()
