"""A whole Llama-2-7B-shaped run on a CPU: load, select, one step, refresh, export.

    python -m benchmarks.llama2_7b [--work DIR] [--layers 32] [--streamed]

Writes a checkpoint of random bf16 weights (13 GB) where there is none, loads it in NF4 with stock
transformers, selects 5 %, makes one real training step of 128 tokens, refreshes the mask and
exports a merged fp16 checkpoint. Per phase: the peak of live tensor bytes against the plan, the
peak of anonymous resident memory (sampled every 50 ms), seconds. Weights have a slowly falling
spectrum, as trained ones do; a flat one would have no principal weights to find.

The step's plan is one without retired entries, which a run has only after its first refresh; the
refresh's plan has room for them. Loading is not spread over threads here, so that every tensor of
it is seen.

--streamed: base and state are streamed, embedding and head in INT8, updates in the backward pass.
On a CPU what is streamed is in the same memory as the two buffers, and is counted beside them.
"""

from __future__ import annotations

import argparse
import gc
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import AutoModelForCausalLM, LlamaConfig

from benchmarks.common import write_rows
from leanlift import LiftTrainer, get_lift_model, merge_adapter, refresh_mask, save_adapter
from leanlift.data.tokenizer import load_tokenizer
from leanlift.demo.run import BASE
from leanlift.io.tensors import write_json
from leanlift.measure import MemoryMeter, state_buffers, static_categories
from leanlift.model import stream_base
from leanlift.model.stream_state import state_pool_of
from leanlift.optim import state_nbytes
from leanlift.training import LiftSFTConfig, MemoryCallback, RunArguments, plan_of
from leanlift.training.base import load_model

GIB = 2**30
TOKENS = 128
SPECTRUM = 256


def write_checkpoint(path: Path, layers: int) -> None:
    """Random bf16 weights in one shard per layer."""
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )
    path.mkdir(parents=True)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    names = list(empty.state_dict())
    group = {n: n.split(".layers.")[1].split(".")[0] if ".layers." in n else "ends" for n in names}
    for label in tqdm(dict.fromkeys(group.values()), desc="Writing", unit="shard"):
        shards[label] = {}
        for name in (n for n in names if group[n] == label):
            shape = tuple(empty.state_dict()[name].shape)
            shards[label][name] = random_tensor(shape, generator)
            places[name] = f"model-{label}.safetensors"
        save_file(shards.pop(label), path / f"model-{label}.safetensors", {"format": "pt"})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": places})
    config.save_pretrained(path)
    for file in BASE.glob("*token*"):
        shutil.copy(file, path)


def random_tensor(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """A norm of ones, or a matrix with a falling spectrum over noise, with a trained one's size."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    weight = torch.randn(shape, generator=generator)
    left = torch.randn(shape[0], SPECTRUM, generator=generator)
    left *= torch.arange(1, SPECTRUM + 1) ** -0.6
    weight.mul_(0.5).add_(left @ torch.randn(SPECTRUM, shape[1], generator=generator), alpha=0.5)
    return (0.02 * weight / weight.std()).bfloat16()


class Anonymous:
    """The peak of this process's anonymous resident memory, sampled in a thread."""

    def __init__(self) -> None:
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    self.peak = max(self.peak, int(line.split()[1]) * 1024)
            time.sleep(0.05)


class Phases:
    """What each phase takes, against its plan: one row each."""

    def __init__(self, plan: dict[str, int]) -> None:
        self.plan = plan
        self.rows: list[dict[str, Any]] = []
        self.meter = MemoryMeter(torch.device("cpu"))
        self.anonymous = Anonymous()

    @contextmanager
    def phase(self, name: str, follow: bool = False, static: int = 0) -> Iterator[Any]:
        gc.collect()
        self.anonymous.peak = 0
        with self.meter.phase(name, follow=follow, static=static) as peak:
            yield peak
        planned = self.plan[name]
        self.rows.append(
            {
                "phase": name,
                "seconds": round(peak.seconds, 1),
                "tensors GiB": round((peak.tensors or 0) / GIB, 3),
                "planned GiB": round(planned / GIB, 3),
                "planned / measured": round(planned / peak.tensors, 3) if peak.tensors else "",
                "anonymous GiB": round(self.anonymous.peak / GIB, 3),
            }
        )
        print(self.rows[-1], flush=True)


def settings(work: Path, streamed: bool) -> tuple[RunArguments, LiftSFTConfig]:
    """What the run is told."""
    loop: dict[str, Any] = {"optim_in_backward": True, "max_grad_norm": 0.0} if streamed else {}
    args = RunArguments(
        model_name_or_path=str(work / "base"),
        dataset_name="rows.json",
        dtype="bfloat16",
        values_dtype="bfloat16",
        refresh_interval=400,
        stream_base=streamed,
        stream_state=streamed,
        quantize_embeddings=streamed,
    )
    sft = LiftSFTConfig(
        output_dir=str(work / "run"),
        use_cpu=True,
        bf16=False,
        optim="sparse_adamw_8bit",
        max_steps=1,
        per_device_train_batch_size=1,
        max_length=TOKENS,
        save_strategy="no",
        **loop,
    )
    return args, sft


def run(work: Path, streamed: bool) -> list[dict[str, Any]]:
    """Load, select, step, refresh and export over `work`'s base; one row per phase."""
    args, sft = settings(work, streamed)
    plan = plan_of(replace(args, refresh_interval=0), sft, cuda=False).phases
    plan["refresh"] = plan_of(args, sft, cuda=False).phases["refresh"]
    phases = Phases(plan)
    brought = 0
    with phases.phase("load", follow=True):
        model = load_model(args, torch.device("cpu"))
        if streamed:
            pool = stream_base(model, torch.device("cpu"), state=True)
            brought = pool.nbytes + pool.host_nbytes
    held = sum(static_categories(model).values()) + brought
    with phases.phase("select", follow=True, static=held):
        get_lift_model(model, args.lift_config())
    memory = MemoryCallback(phases.meter)
    with phases.phase("train") as peak:
        trainer = LiftTrainer(
            model=model,
            args=sft,
            train_dataset=Dataset.from_list([{"text": "reverse abc is cba " * 60}] * 2),
            processing_class=load_tokenizer(args.model_name_or_path),
            callbacks=[memory],
        )
        trainer.train()
        peak.tensors = memory.peak
    moments = state_nbytes(trainer.optimizer, state_buffers(model))
    static = sum(static_categories(model).values()) + moments
    state = state_pool_of(model)
    if state is not None:  # a refresh lays all blocks out anew, in buffers that it makes
        static -= state.host_nbytes
    with phases.phase("refresh", follow=True, static=static):
        print(refresh_mask(model, trainer.optimizer))
    save_adapter(model, work / "adapter")
    del model, trainer, memory
    with phases.phase("export", follow=True):
        merge_adapter(work / "adapter", work / "merged")
    return phases.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", default="llama2-7b-random", help="13 GB twice")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--streamed", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
    work = Path(arguments.work)
    if not (work / "base" / "config.json").is_file():
        shutil.rmtree(work / "base", ignore_errors=True)
        write_checkpoint(work / "base", arguments.layers)
    for leftover in ("adapter", "merged", "run"):
        shutil.rmtree(work / leftover, ignore_errors=True)
    rows = run(work, arguments.streamed)
    for row in rows:
        row["layers"] = arguments.layers
    if arguments.layers == 32:
        name = "llama2_7b_streamed" if arguments.streamed else "llama2_7b"
        print(f"Wrote {write_rows(name, rows)}")


if __name__ == "__main__":
    main()
