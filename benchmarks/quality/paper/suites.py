"""What is run: two suites of the LIFT paper (arXiv 2506.00772), and PEFT's method comparison.

The paper's: its settings for each of its bases (appendix), batch 16, three epochs, linear decay
after 3 % warm-up, AdamW (0.9, 0.95, eps 1e-6) without weight decay; every method at the paper's
learning rate for LIFT, unless another is given.

PEFT's (github.com/huggingface/peft, method_comparison/MetaMathQA; `default_training_params.json`,
`run.py`, `utils.py`, `data.py` there, and pull requests 2925, 2986 and 3419 for what it calls
forgetting): Llama-3.2-3B in bf16, 5000 batches of 4 rows in the order of MetaMathQA, of at most 768
tokens and 1300 characters, sorted by length in buckets of 20 batches; prompts are trained too;
AdamW with torch's betas and weight decay 0.1, cosine decay after 10 % warm-up, clipping at 1, no
gradient checkpointing, seed 0. Its rows train r (m + n) parameters of q_proj and v_proj, r = 32,
and so do the ones here that are to stand beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.quality.methods import TARGETS
from benchmarks.quality.paper.lift import Lift
from benchmarks.quality.paper.peers import Full, Lora
from benchmarks.quality.paper.task import Method

BASES = {
    (2048, 16, 128256): "3.2-1b",
    (3072, 28, 128256): "3.2-3b",
    (4096, 32, 32000): "2-7b",
    (4096, 32, 128256): "3-8b",
}
"""(hidden_size, num_hidden_layers, vocab_size) of a config.json -> the paper's name of the base."""


@dataclass(frozen=True)
class Setting:
    """What the paper trains a base with.

    Attributes:
        lr: learning rate.
        rank: r of the budget r (m + n).
        approx_rank: R.
        interval: steps between refreshes.
    """

    lr: float
    rank: int
    approx_rank: int
    interval: int


@dataclass(frozen=True)
class Suite:
    """A training set, what is trained on it, and what that is tested on.

    Attributes:
        name: of the suite.
        tests: names of the test sets; those that are there are taken.
        settings: the paper's name of a base -> its settings; none: the same for every base.
        methods: name -> how it is trained, given the settings.
        loop: fields of LiftSFTConfig.
        batch: rows of a step.
        new_tokens: of an answer, at most.
        test_batch: prompts that are answered at a time.
        as_peft: rows, prompts, answers and forgetting as PEFT's comparison has them.
    """

    name: str
    tests: tuple[str, ...]
    settings: Mapping[str, Setting]
    methods: Mapping[str, Method]
    loop: Mapping[str, Any]
    batch: int
    new_tokens: int
    test_batch: int
    as_peft: bool = False

    def setting(self, base: str | None) -> Setting | None:
        """Those of a base by the paper's name; None where the suite has none."""
        return self.settings[base] if base is not None and self.settings else None


PAPERS_LOOP = {
    "num_train_epochs": 3,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 4,
    "max_length": 2048,
}
"""The rest are the defaults of LiftSFTConfig, which are the paper's."""

PEFTS_LOOP = {
    "max_steps": 5000,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 768,
    "learning_rate": 1e-4,
    "weight_decay": 0.1,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
    "train_sampling_strategy": "sequential",
    "seed": 0,
}

SPARSE = {"learning_rate": 3e-4, "weight_decay": 0.01}
"""Their settings for SHiRA, the method of theirs that is closest to ours."""

QV = ("q_proj", "v_proj")

PAPERS_METHODS: dict[str, Method] = {
    "principal-nf4": Lift("nf4"),
    "qlora-nf4": Lora("nf4", TARGETS),
    "principal-16bit": Lift("16bit"),
    "principal-int8": Lift("int8"),
    "magnitude-nf4": Lift("nf4", {"selector": "magnitude"}),
    "random-nf4": Lift("nf4", {"selector": "random"}),
    "lora-16bit": Lora("16bit", TARGETS),
    "full-16bit": Full(),
}

AS_THEIRS = {
    "rank_budget": 32, "approx_rank": 32, "target_modules": QV, "refresh_interval": 0,
}  # fmt: skip
FIVE_PERCENT = {"density": 0.05, "approx_rank": 64, "refresh_interval": 0}
"""Masks stay as they are, as SHiRA's do: what a refresh retires would be beyond the budget."""

PEFTS_METHODS: dict[str, Method] = {
    "principal-16bit": Lift("16bit", AS_THEIRS, SPARSE),
    "principal-nf4": Lift("nf4", AS_THEIRS, SPARSE),
    "qlora-nf4": Lora("nf4", QV, rank=32, alpha=64, autocast=False),
    "lora-16bit": Lora("16bit", QV, rank=32, alpha=64, autocast=False),
    "principal-16bit-5%": Lift("16bit", FIVE_PERCENT, SPARSE),
    "principal-nf4-5%": Lift("nf4", FIVE_PERCENT, SPARSE),
    "rslora-16bit": Lora("16bit", QV, rank=64, alpha=64, scaled=True, autocast=False),
    "full-16bit": Full({"learning_rate": 1e-5}, autocast=False),
}

ARITHMETIC = ("multiarith", "gsm8k", "addsub", "aqua", "singleeq", "svamp", "mawps")
COMMONSENSE = (
    "boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc-easy", "arc-challenge", "obqa",
)  # fmt: skip

SUITES = {
    suite.name: suite
    for suite in (
        Suite(
            "math",
            ARITHMETIC,
            settings={
                "3.2-1b": Setting(2e-4, 128, 32, 400),
                "3.2-3b": Setting(2e-4, 128, 64, 10),
                "2-7b": Setting(2e-4, 128, 64, 400),
                "3-8b": Setting(1e-4, 128, 128, 400),
            },
            methods=PAPERS_METHODS,
            loop=PAPERS_LOOP,
            batch=16,
            new_tokens=256,
            test_batch=16,
        ),
        Suite(
            "commonsense",
            COMMONSENSE,
            settings={"2-7b": Setting(1e-4, 128, 64, 2000), "3-8b": Setting(5e-5, 32, 16, 2000)},
            methods=PAPERS_METHODS,
            loop=PAPERS_LOOP,
            batch=16,
            new_tokens=32,
            test_batch=16,
        ),
        Suite(
            "metamath",
            ("gsm8k",),
            settings={},
            methods=PEFTS_METHODS,
            loop=PEFTS_LOOP,
            batch=4,
            new_tokens=300,
            test_batch=50,
            as_peft=True,
        ),
    )
}
