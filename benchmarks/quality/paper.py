"""The paper's own runs (arXiv 2506.00772), for whoever has the weights and the data.

    python -m benchmarks.quality --preset paper --suite math --model Llama-2-7b \\
        --data math_10k.json --tests tests/ --output runs/

`--tests` is a directory with one JSON file per test set, named after it (`gsm8k.json`, …), rows
with instruction, input, output, answer. Training goes through `leanlift train`'s own path, LoRA
and full fine-tuning through TRL's SFTTrainer, all with the paper's settings; answers are greedy. A
method whose result is there is not run again. `--lr` is for methods that the paper's rate for LIFT
does not suit, such as full fine-tuning.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTTrainer

from benchmarks.quality.methods import TARGETS
from leanlift.data.dataset import load_rows, to_examples
from leanlift.data.tokenizer import load_tokenizer
from leanlift.errors import UserError
from leanlift.evaluation import evaluate
from leanlift.io.tensors import write_json
from leanlift.training import LiftSFTConfig, RunArguments, run
from leanlift.training.base import load_model


@dataclass(frozen=True)
class Suite:
    """A training set of the paper with its settings for Llama-2-7B.

    Attributes:
        tests: names of the test sets.
        lr, rank, approx_rank, interval: the paper's.
        max_new_tokens: of an answer.
    """

    tests: tuple[str, ...]
    lr: float
    rank: int
    approx_rank: int
    interval: int
    max_new_tokens: int


SUITES = {
    "math": Suite(
        ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps"),
        lr=2e-4,
        rank=128,
        approx_rank=64,
        interval=400,
        max_new_tokens=256,
    ),
    "commonsense": Suite(
        ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-easy", "arc-challenge", "obqa"),
        lr=1e-4,
        rank=128,
        approx_rank=64,
        interval=2000,
        max_new_tokens=32,
    ),
}

METHODS: dict[str, dict[str, Any]] = {
    "principal-nf4": {},
    "qlora-nf4": {"peer": "lora"},
    "principal-16bit": {"load_in_4bit": False},
    "principal-int8": {"load_in_4bit": False, "load_in_8bit": True},
    "magnitude-nf4": {"selector": "magnitude"},
    "random-nf4": {"selector": "random"},
    "lora-16bit": {"peer": "lora", "load_in_4bit": False},
    "full-16bit": {"peer": "full", "load_in_4bit": False},
}
"""What differs from principal on NF4. `peer`: instead of leanlift, "lora": PEFT's LoRA of equal
parameters; "full": every weight, in the base's dtype, which for a 7B takes a GPU of 80 GB."""


@dataclass(frozen=True)
class Paths:
    """What the user supplies.

    Attributes:
        model: the base.
        data: training rows.
        tests: directory of the test sets.
        output: where runs and results go.
        settings: fields of LiftSFTConfig that differ from the paper's.
    """

    model: str
    data: Path
    tests: Path
    output: Path
    settings: dict[str, Any] = field(default_factory=dict)


def paper(suite: Suite, paths: Paths, methods: list[str], limit: int | None = None) -> None:
    """Train and test each method; results go to `<output>/<method>.json` as they come.

    Args:
        suite: which of the paper's settings.
        paths: weights, data, output.
        methods: names in `METHODS`.
        limit: rows of each test set, at most.

    Raises:
        UserError: no test set is there.
    """
    tests = {name: paths.tests / f"{name}.json" for name in suite.tests}
    found = {name: path for name, path in tests.items() if path.is_file()}
    if not found:
        raise UserError(f"{paths.tests} holds none of {', '.join(tests)} as .json files.")
    for name in methods:
        result = paths.output / f"{name}.json"
        if not result.is_file():
            scores = _one(name, suite, paths, found, limit)
            write_json(result, scores)
        print(name, result.read_text(encoding="utf-8"), flush=True)
    print(average_table(paths.output, methods, list(found)))


def average_table(output: Path, methods: list[str], tests: list[str]) -> str:
    """The results as markdown, with the mean over test sets."""
    lines = ["| method | " + " | ".join(tests) + " | mean |", "|---" * (len(tests) + 2) + "|"]
    for name in methods:
        scores = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))
        exact = [scores[test]["exact_match"] for test in tests]
        cells = (f"{100 * value:.2f}" for value in (*exact, sum(exact) / len(exact)))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _one(
    name: str, suite: Suite, paths: Paths, tests: dict[str, Path], limit: int | None
) -> dict[str, Any]:
    changes = dict(METHODS[name])
    peer = changes.pop("peer", None)
    args = RunArguments(
        model_name_or_path=paths.model,
        dataset_name=str(paths.data),
        rank_budget=suite.rank,
        approx_rank=suite.approx_rank,
        refresh_interval=suite.interval,
    )
    args = replace(args, **changes)
    sft = LiftSFTConfig(
        **{
            "output_dir": str(paths.output / name),
            "learning_rate": suite.lr,
            "num_train_epochs": 3,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 16,
            "max_length": 2048,
            "save_strategy": "no",
            "use_cpu": not torch.cuda.is_available(),
            **paths.settings,
        }
    )
    model, tokenizer = _lift(args, sft) if peer is None else _peer(peer, args, sft)
    scores = {}
    for test, path in tests.items():
        rows = load_rows(str(path))
        rows = rows.select(range(min(limit or len(rows), len(rows))))
        scores[test] = evaluate(
            model, tokenizer, rows, max_new_tokens=suite.max_new_tokens
        ).to_dict()
    return scores


def _lift(args: RunArguments, sft: LiftSFTConfig) -> tuple[Any, Any]:
    result = run(args, sft)
    return result.model, result.tokenizer


def _peer(kind: str, args: RunArguments, sft: LiftSFTConfig) -> tuple[Any, Any]:
    """LoRA of the same number of parameters, or full fine-tuning, on the same examples."""
    assert args.rank_budget is not None
    cuda = torch.cuda.is_available()
    model = load_model(args, torch.device("cuda", 0) if cuda else torch.device("cpu"))
    tokenizer = load_tokenizer(args.model_name_or_path)
    rows = load_rows(args.dataset_name)
    chat = getattr(tokenizer, "chat_template", None) is not None
    examples: Dataset = to_examples(rows, chat)
    lora = LoraConfig(
        r=args.rank_budget,
        lora_alpha=2 * args.rank_budget,
        lora_dropout=0.0,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=model,
        args=sft,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=lora if kind == "lora" else None,
    )
    trainer.train()
    return trainer.model, tokenizer
