"""Means over the trained tokens of an evaluation, whatever the size of its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanlift.training.loss import IGNORED, TRAINED


def trained_tokens(inputs: Any) -> Tensor | int:
    """How many tokens of a batch are trained; on its device where counting needs it."""
    places = inputs.get(TRAINED)
    if places is not None:
        return int(places.numel())
    labels = inputs.get("labels")
    if labels is None:
        return 1
    return (labels[:, 1:] != IGNORED).sum()


class TokenMeans:
    """Sums of batch means times their numbers of tokens, kept on the device."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.tokens: dict[str, Tensor] = {}

    def add(self, name: str, mean: Tensor, tokens: Tensor | int) -> None:
        """A batch: its mean, and the tokens that it is a mean of."""
        count = torch.as_tensor(tokens, dtype=torch.float64, device=mean.device)
        value = torch.where(count > 0, mean.detach().double() * count, 0.0)
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.tokens[name] = self.tokens.get(name, 0.0) + count

    def means(self, accelerator: Any) -> dict[str, float]:
        """Over all batches of all processes."""
        found = {}
        for name, total in self.sums.items():
            both = torch.stack([total, self.tokens[name]])
            total, tokens = accelerator.reduce(both, "sum").tolist()
            if tokens:
                found[name] = total / tokens
        return found
