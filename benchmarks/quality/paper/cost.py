"""What training takes, in floating-point operations counted from shapes and rows.

A matrix product of T tokens with a matrix [m, n] is 2 T m n operations. Training takes it forward,
once more where blocks are recomputed (gradient checkpointing), once for the gradient of its input,
and where the matrix itself is trained once for that of its entries: leanlift forms that densely, a
range of rows at a time. Attention over a row of T tokens is 4 T² operations per unit of width, half
of it where the mask is causal; its backward pass is twice that. Norms, softmax, the optimizer and
dequantization are left out, as is padding, and a selection counts the least that it can take.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from leanlift.errors import UserError, first_line

SHARE = 0.4
"""Of a card's peak: what well-fed training of this kind reaches. An assumption, not a figure."""

PEAKS = {
    "H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "RTX 6000 Ada": 364,
    "RTX 5090": 210, "RTX 4090": 165, "RTX 3090": 71, "A10G": 70,
}  # fmt: skip
"""Part of a card's name -> TFLOP/s of dense bf16 products with fp32 sums, by its data sheet."""


@dataclass(frozen=True)
class Rows:
    """Rows that a run trains on.

    Attributes:
        lengths: tokens of each, as they are cut.
        steps: optimizer steps of the whole run.
        seen: rows of the whole run.
    """

    lengths: Sequence[int]
    steps: int
    seen: int

    @property
    def tokens(self) -> int:
        """Of the whole run."""
        return round(sum(self.lengths) * self.seen / len(self.lengths))

    @property
    def squares(self) -> int:
        """Sum over rows of the square of their tokens, of the whole run."""
        return round(sum(n * n for n in self.lengths) * self.seen / len(self.lengths))


@dataclass(frozen=True)
class Shapes:
    """A base as matrices.

    Attributes:
        linears: (name, m, n) of each Linear inside the blocks.
        head: entries of the output head.
        width: layers times heads times their dimension.
        parameters: of the whole model.
    """

    linears: tuple[tuple[str, int, int], ...]
    head: int
    width: int
    parameters: int

    @classmethod
    def of(cls, directory: str) -> Shapes:
        """Of a checkpoint's config.json, without a weight.

        Raises:
            UserError: it is none of a language model.
        """
        try:
            config: Any = AutoConfig.from_pretrained(directory).get_text_config()
            with torch.device("meta"):
                model: Any = AutoModelForCausalLM.from_config(config)
        except Exception as error:  # each config class has its own ways to refuse
            raise UserError(
                f"{directory} is no checkpoint of a language model: {first_line(error)}"
            ) from error
        head = model.get_output_embeddings().weight
        found = tuple(
            (name, *module.weight.shape)
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.weight is not head
        )
        heads = config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(
            found, head.numel(), config.num_hidden_layers * heads * size, model.num_parameters()
        )

    def of_targets(self, targets: Collection[str] | None) -> list[tuple[int, int]]:
        """Shapes of the Linears with these last names; None: of all."""
        return [
            (m, n)
            for name, m, n in self.linears
            if targets is None or name.rpartition(".")[2] in targets
        ]

    def passes(self, rows: Rows, recomputed: bool) -> int:
        """Operations of forward and backward passes that train nothing."""
        blocks = 2 * rows.tokens * sum(m * n for _, m, n in self.linears)
        attention = 2 * rows.squares * self.width
        head = 2 * rows.tokens * self.head
        again = int(recomputed)
        return (2 + again) * blocks + (3 + again) * attention + 2 * head

    def answers(self, prompts: int, tokens: int) -> int:
        """Operations of so many tokens of prompts and of answers, attention left out."""
        each = 2 * sum(m * n for _, m, n in self.linears)
        return each * (prompts + tokens) + 2 * self.head * tokens


def selection(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """The least operations that finding principal entries of these matrices takes: the columns of
    the Krylov basis at which the mask is first looked at, or a Gram matrix and its eigenvectors."""
    total = 0
    for m, n in shapes:
        side = min(m, n)
        krylov, gram = 10 * m * n * (rank + 8), 2 * m * n * side + 25 * side**3
        total += min(krylov, gram) + 2 * m * n * rank
    return total


def peak_of(name: str) -> float | None:
    """TFLOP/s of a card by its name, where it is known."""
    return next((float(peak) for part, peak in PEAKS.items() if part in name), None)


def in_hours(operations: float, peak: float | None, name: str) -> str:
    """ "about 310 PFLOP; at 40 % of … that is about 0.2 h"."""
    said = f"about {operations / 1e15:,.3g} PFLOP"
    if peak is None:
        return f"{said}; the peak of {name} is not known here (--tflops says it)"
    hours = operations / (SHARE * peak * 1e12) / 3600
    return f"{said}; at {SHARE:.0%} of the {peak:,.0f} TFLOP/s of {name} about {hours:,.2g} h"
