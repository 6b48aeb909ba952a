"""Means over the trained tokens of an evaluation, whatever the size of its batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanlift.training.loss import IGNORED, TRAINED
from leanlift.training.overrides import TrainerOverrides


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


LOGGED_MEANS = ("entropy", "mean_token_accuracy")
"""What is logged beside the loss as a mean over tokens."""


class EvaluatesByToken(TrainerOverrides):
    """A trainer whose evaluation gives means over trained tokens."""

    _eval_means: TokenMeans

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """As TRL's, and keeps what the mean over tokens needs."""
        found = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        if found[0] is not None:
            count, logged = trained_tokens(inputs), self.logged("eval")
            self._eval_means.add("loss", found[0], count)
            for name in LOGGED_MEANS:
                if logged[name]:
                    self._eval_means.add(name, torch.as_tensor(logged[name][-1]), count)
        return found

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As Trainer's, with means over trained tokens instead of means of the batches' means,
        which depend on the batch size: the best checkpoint is chosen by them."""
        self._eval_means = TokenMeans()
        output = super().evaluation_loop(
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        means = self._eval_means.means(self.accelerator)
        key = f"{metric_key_prefix}_loss"
        if key in output.metrics and "loss" in means:
            output.metrics[key] = means["loss"]
        for name in LOGGED_MEANS:
            if name in means:
                self.logged("eval")[name] = [means[name]]
        return output
