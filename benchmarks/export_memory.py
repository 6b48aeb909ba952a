"""What a merge holds in memory, at real sizes: at most the largest tensor plus 256 MiB.

    python -m benchmarks.export_memory [--vocabulary 128256] [--hidden 4096] [--intermediate 14336]

Writes a one-layer checkpoint with the tensors of Llama-3-8B (an embedding and a head of 1 GB each,
in bf16), takes an adapter of 1 % of it over every base format, and merges it onto the original and
onto the quantized weights, each in a process of its own. Measured are live tensor bytes, and the
growth of anonymous resident memory over what the process had before the merge (sampled every
10 ms). Mapped files are neither: the kernel takes their pages back when it needs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig

from benchmarks.common import write_rows
from leanlift import LiftConfig, get_lift_model, merge_adapter, save_adapter
from leanlift.export import ONTO
from leanlift.measure import LiveBytes

MIB = 2**20
BOUND_OVER_LARGEST = 256 * MIB
FORMATS: dict[str, dict[str, Any] | None] = {
    "nf4+double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                   "bnb_4bit_use_double_quant": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "int8": {"load_in_8bit": True},
    "bfloat16": None,
}  # fmt: skip


def write_base(path: Path, vocabulary: int, hidden: int, intermediate: int) -> None:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=hidden // 128 or 1,
        num_key_value_heads=max(1, hidden // 512),
        tie_word_embeddings=False,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(path)


def write_adapter(base: Path, kind: str, ends: bool, path: Path) -> None:
    """Random offsets at the 1 % largest weights; loaded in fp32, which is the larger case."""
    options = FORMATS[kind]
    quantization = None if options is None else BitsAndBytesConfig(**options)
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32
    )
    config = LiftConfig(density=0.01, selector="magnitude", quantize_embeddings=ends)
    model = get_lift_model(model, config, progress=False)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=1e-3)
    save_adapter(model, path)
    del model
    gc.collect()  # of each format a model of 4 GB


class Anonymous:
    """The peak growth of this process's anonymous resident memory."""

    def __init__(self) -> None:
        self._before, self.peak, self._done = self._now(), 0, False
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        self._done = True
        self._thread.join()
        return self.peak

    def _sample(self) -> None:
        while not self._done:
            self.peak = max(self.peak, self._now() - self._before)
            time.sleep(0.01)

    @staticmethod
    def _now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        return 0


def measure(adapter: str, output: str, onto: str) -> None:
    """One merge, in this process; prints what it took as JSON."""
    torch.set_num_threads(1)
    anonymous, started = Anonymous(), time.perf_counter()
    with LiveBytes() as live:
        report = merge_adapter(adapter, output, onto=onto, progress=False)
    seconds = time.perf_counter() - started
    print(json.dumps({"live": live.peak, "anonymous": anonymous.stop(), "seconds": seconds,
                      "nbytes": report.nbytes}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--no_csv", action="store_true")
    parser.add_argument("--merge", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.merge:
        return measure(*arguments.merge)
    torch.set_num_threads(1)
    vocabulary, hidden, wide = arguments.vocabulary, arguments.hidden, arguments.intermediate
    largest = 2 * max(vocabulary, wide) * hidden
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        write_base(work / "base", vocabulary, hidden, wide)
        for kind, ends in [*((kind, False) for kind in FORMATS), ("nf4+double", True)]:
            adapter = work / f"adapter-{kind}-{ends}"
            write_adapter(work / "base", kind, ends, adapter)
            for onto in ONTO:
                rows.append(merge_row(kind, ends, onto, adapter, work / "merged", largest))
                print(rows[-1], flush=True)
    if not all(row["within the bound"] for row in rows):
        raise SystemExit("a merge took more than the largest tensor plus 256 MiB")
    if not arguments.no_csv:
        print(f"Wrote {write_rows('export_memory', rows)}")
    return None


def merge_row(
    kind: str, ends: bool, onto: str, adapter: Path, output: Path, largest: int
) -> dict[str, Any]:
    """Merge in a fresh process, and delete what it wrote."""
    command = [sys.executable, "-m", "benchmarks.export_memory", "--merge"]
    done = subprocess.run(
        [*command, str(adapter), str(output), onto], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    subprocess.run(["rm", "-r", str(output)], check=True)
    taken = max(found["live"], found["anonymous"])
    return {
        "base": kind + (", INT8 ends" if ends else ""),
        "onto": onto,
        "tensors MiB": round(found["live"] / MIB),
        "anonymous MiB": round(found["anonymous"] / MIB),
        "bound MiB": round((largest + BOUND_OVER_LARGEST) / MIB),
        "within the bound": taken <= largest + BOUND_OVER_LARGEST,
        "seconds": round(found["seconds"], 1),
        "MB per second": round(found["nbytes"] / found["seconds"] / 1e6),
    }


if __name__ == "__main__":
    main()
