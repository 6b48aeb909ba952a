"""What a mask refresh costs beside the training steps between two of them.

    python -m benchmarks.refresh [--device cuda] [--hidden 2048] [--layers 2] [--tokens 1024]

A Llama whose NF4 weights have a spectrum like trained ones (a flat one takes several times as
long to select from) learns random tokens with activation checkpointing. Steps and refreshes take
turns in one process; their medians give the share of all time that refreshes take at intervals of
10, 100 and 400 steps.
"""

from __future__ import annotations

import argparse
import time
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from benchmarks.common import timed, write_rows
from benchmarks.real_matrix import trained_like
from leanlift import LiftConfig, get_lift_model, refresh_mask
from leanlift.model import lift_layers, lift_state
from leanlift.optim import SparseAdamW
from leanlift.weights.quantized import WeightFormat, requantize

INTERVALS = (10, 100, 400)


def build(hidden: int, layers: int, device: torch.device) -> Any:
    """A Llama with widths in Llama-2-7B's proportions, its Linears in NF4 with double
    quantization."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 11008 // 4096,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        vocab_size=2048,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)
    fmt = WeightFormat("nf4", str(dtype).removeprefix("torch."), 64, True)
    names = [n for n, m in model.named_modules() if n.endswith("_proj")]
    for name in names:
        weight = model.get_submodule(name).weight.data
        realistic = trained_like(*weight.shape).to(device)
        weight = (realistic * (weight.float().std() / realistic.std())).to(dtype)
        packed: Any = requantize(weight, fmt, device)
        model.set_submodule(name, packed.module)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    device = torch.device(arguments.device)
    model = build(arguments.hidden, arguments.layers, device)
    model = get_lift_model(model, LiftConfig(approx_rank=arguments.rank), progress=False)
    first = lift_state(model).selection_seconds
    values = [layer.values for layer in lift_layers(model).values()]
    optimizer = SparseAdamW(values, lr=2e-4)
    tokens = torch.randint(2048, (1, arguments.tokens), device=device)

    def step() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps, refreshes, churn = [], [], []
    for _ in range(arguments.rounds):
        steps += [timed(step)[1] for _ in range(3)]
        report, seconds = timed(lambda: refresh_mask(model, optimizer))
        refreshes.append(seconds)
        churn.append(report.churn)
    one, other = median(steps), median(refreshes)
    row = {
        "hidden": arguments.hidden,
        "layers": arguments.layers,
        "tokens": arguments.tokens,
        "R": arguments.rank,
        "first selection s": round(first, 2),
        "refresh s": round(other, 2),
        "step s": round(one, 3),
        "refresh in steps": round(other / one, 2),
        "churn": round(median(churn), 4),
    }
    for interval in INTERVALS:
        row[f"share at interval {interval}"] = round(other / (other + interval * one), 4)
    return [row]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    started = time.perf_counter()
    rows = measure(arguments)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))
    path = write_rows("refresh", rows)
    print(f"Wrote {path} in {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
