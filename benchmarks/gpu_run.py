"""What a user does, on a device: train, resume, evaluate, merge and verify, from the command line.

A part of `gpu_proof`. The base is a random Llama of some 10 M parameters with the demo's tokenizer
on generated rows: every format and kernel, small enough for a dozen runs.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks import liger
from benchmarks.common import timed
from leanlift.cli import main

Rows = list[dict[str, Any]]
DEMO = Path(__file__).parents[1] / "leanlift" / "demo" / "base"
STEPS, SAVED = 6, 3

INT8_EMBEDDINGS = [
    "--optim", "sparse_adamw_8bit", "--values_dtype", "bfloat16", "--quantize_embeddings", "true",
    "--optim_in_backward", "true", "--max_grad_norm", "0",
]  # fmt: skip
OFFLOADED = [*INT8_EMBEDDINGS, "--activation_offloading", "true", "--embedding_on_cpu", "true"]
STREAMED = [*OFFLOADED, "--stream_base", "true", "--stream_state", "true"]
FUSED = {"fused": ["--fused_elementwise", "true", "--tiled_mlp", "true", "--mlp_tokens", "512"]}
"""Where Liger is installed."""
KINDS = {
    "nf4": [],
    "int8_embeddings": INT8_EMBEDDINGS,
    "int8": ["--load_in_8bit", "true", "--load_in_4bit", "false"],
    "bf16": ["--load_in_4bit", "false"],
    "fp16 loop": ["--fp16", "true", "--dtype", "float16"],
}


def runs(device: torch.device, small: bool) -> Rows:
    """Rows of section 7."""
    with tempfile.TemporaryDirectory() as directory:
        return _runs(Path(directory), device.type == "cuda", small)


def _runs(root: Path, cuda: bool, small: bool) -> Rows:
    rows: Rows = []

    def holds(what: str, value: Any, bar: str, good: bool) -> None:
        rows.append({"what": what, "value": value, "bar": bar, "holds": good})

    make_base(root / "base", small)
    make_rows(root / "rows.json", 160)
    make_rows(root / "few.json", 16)
    kinds = {"int8_embeddings": INT8_EMBEDDINGS} if small else {
        **KINDS, "offloaded": OFFLOADED, "streamed": STREAMED,
        **(FUSED if liger.version() != "absent" else {}),
    }  # fmt: skip
    for kind, options in kinds.items():
        out = root / kind.replace(" ", "-")
        said, took = timed(lambda o=out, more=options: train(root, o, more))
        holds(f"train, {kind}, s", round(took, 1), "ends well", said == "")
        if said:
            rows.append({"what": f"train, {kind}", "value": said})
            continue
        rows += _planned(out, kind)
        few, merged = str(root / "few.json"), root / f"merged-{out.name}"
        said = told(["eval", "--adapter", str(out), "--data", few])
        holds(f"eval, {kind}", said or "ok", "ends well", said == "")
        if cuda and kind not in ("nf4", "offloaded", "streamed", *FUSED):
            continue
        restart(out, root / "again")
        said = train(root, root / "again", [*options, "--resume_from_checkpoint", "true"])
        apart = "did not resume: " + said if said else difference(out, root / "again")
        what = f"resumed, {kind}, against not interrupted"
        if cuda:  # attention's backward pass sums in another order each time
            rows.append({"what": what, "value": apart})
        else:
            holds(what, apart, "0", apart == 0)
        shutil.rmtree(root / "again")
        said = told(["export", str(out), str(merged), "--verify"])
        holds(f"export, verified, {kind}", said or "ok", "ends well", said == "")
    if cuda:
        said = train(root, root / "torch", ["--ops", "torch"])
        apart = said or difference(root / "nf4", root / "torch")
        rows.append({"what": "values, Triton against torch, largest difference", "value": apart})
    return rows


def told(arguments: list[str]) -> str:
    """ "" where a command ends well, else the last line that it has said."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(arguments)
    lines = [line for line in (out.getvalue() + err.getvalue()).splitlines() if line.strip()]
    return "" if code == 0 else f"{code}: {lines[-1] if lines else ''}"[:300]


def train(root: Path, out: Path, options: list[str]) -> str:
    """A short run with two refreshes and a checkpoint in the middle; what went wrong."""
    return told([
        "train", "--model_name_or_path", str(root / "base"),
        "--dataset_name", str(root / "rows.json"), "--output_dir", str(out),
        "--max_steps", str(STEPS), "--save_steps", str(SAVED), "--refresh_interval", "2",
        "--logging_steps", "1", "--per_device_train_batch_size", "4", "--max_length", "512",
        "--approx_rank", "16", "--report_to", "none", *options,
    ])  # fmt: skip


def restart(finished: Path, fresh: Path) -> None:
    """An output directory as a kill after the middle of the run would have left it."""
    checkpoint = f"checkpoint-{SAVED}"
    shutil.copytree(finished / checkpoint, fresh / checkpoint)


def difference(one: Path, other: Path) -> float | str:
    """The largest difference between two adapters' values; a word where they are not alike."""
    first, second = (load_file(d / "adapter_model.safetensors") for d in (one, other))
    if {k: v.shape for k, v in first.items()} != {k: v.shape for k, v in second.items()}:
        return "other masks"
    apart = [(first[k].float() - second[k].float()).abs() for k in first if first[k].numel()]
    return max(float(part.max()) for part in apart)


def _planned(out: Path, kind: str) -> Rows:
    """Plan over measurement of what the device holds, by phase."""
    report = json.loads((out / "memory.json").read_text(encoding="utf-8"))
    if report["device"] == "cpu" or not report["plan"]:
        return []
    planned, rows = report["plan"]["phases"], []
    for phase in ("select", "train"):
        measured = report["phases"][phase]["tensors"]
        share = round(planned[phase] / measured, 3)
        rows.append({"what": f"planned / measured, {kind}, {phase}", "value": share})
    return rows


def make_base(directory: Path, small: bool) -> None:
    """A random Llama with the demo's tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    width = 128 if small else 512
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=2 if small else 3,
        num_attention_heads=width // 64, vocab_size=len(tokenizer), tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def make_rows(path: Path, count: int) -> None:
    draw: Callable[..., list[str]] = random.Random(count).choices
    words = "abcdefgh"
    rows = [
        {"instruction": " ".join(draw(words, k=5 + i % 50)), "output": " ".join(draw(words, k=9))}
        for i in range(count)
    ]
    path.write_text(json.dumps(rows), encoding="utf-8")
