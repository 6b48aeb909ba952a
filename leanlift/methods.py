"""What a run may train on, and which of TRL's trainers does it. Nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

SFT = "sft"


@dataclass(frozen=True)
class Method:
    """One of TRL's trainers.

    Attributes:
        config_file: where its configuration is declared, in the package.
        config: the class of that.
        module, trainer: where the trainer is, and its class.
        learning_rate: the peak that is taken where none is given.
        rows: rows that the policy computes of each row of a batch: a pair is two.
        reference: whether the frozen base, or the adapter that training begins with, is computed
            beside it, without a gradient.
        generates: whether completions are generated while it trains.
    """

    config_file: str
    config: str
    module: str
    trainer: str
    learning_rate: float
    rows: int = 1
    reference: bool = False
    generates: bool = False


METHODS = {
    SFT: Method("trainer/sft_config.py", "SFTConfig", "trl", "SFTTrainer", 2e-4),
    "dpo": Method(
        "trainer/dpo_config.py", "DPOConfig", "trl", "DPOTrainer", 2e-5, rows=2, reference=True
    ),
    "kto": Method("trainer/kto_config.py", "KTOConfig", "trl", "KTOTrainer", 2e-5, reference=True),
    "orpo": Method(
        "experimental/orpo/orpo_config.py", "ORPOConfig", "trl.experimental.orpo", "ORPOTrainer",
        2e-5, rows=2,
    ),
    "cpo": Method(
        "experimental/cpo/cpo_config.py", "CPOConfig", "trl.experimental.cpo", "CPOTrainer",
        2e-5, rows=2,
    ),
    "grpo": Method(
        "trainer/grpo_config.py", "GRPOConfig", "trl", "GRPOTrainer", 2e-5,
        reference=True, generates=True,
    ),
    "rloo": Method(
        "trainer/rloo_config.py", "RLOOConfig", "trl", "RLOOTrainer", 2e-5,
        reference=True, generates=True,
    ),
    "reward": Method(
        "trainer/reward_config.py", "RewardConfig", "trl", "RewardTrainer", 2e-5, rows=2
    ),
}  # fmt: skip
"""By the name that `method` has. Learning rates are our choice: a tenth of what is taken for rows
that are imitated, since a preference says less."""

METHOD_NAMES = tuple(METHODS)
REWARD_HEAD = "score"
"""The head of a reward model, as transformers calls it."""
