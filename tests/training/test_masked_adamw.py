"""A run equals AdamW on dense weights under a mask, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from runs import ROWS, settings
from sweeps import swept
from tiny import load, make_tokenizer
from transformers import AutoModelForCausalLM, get_scheduler

from leanlift import LiftConfig, LiftTrainer, get_lift_model
from leanlift.model import lift_layers


class Recorder(LiftTrainer):
    """Keeps the batches as the training loop saw them."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        self.__dict__.setdefault("batches", []).append(
            ({key: value.clone() for key, value in inputs.items()}, int(num_items_in_batch))
        )
        return super().training_step(model, inputs, num_items_in_batch)


def principal_mask(weight: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """The `count` largest entries of the best rank-R approximation, by a float64 SVD."""
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    scores = ((u[:, :rank] * s[:rank]) @ vh[:rank]).abs().flatten()
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.topk(scores, count).indices] = True
    return mask.view_as(weight)


STEPS, INTERVAL, RANK = 60, 15, 8


def simulate(
    base: Path, start: dict[str, torch.Tensor], counts: dict[str, int], batches: list[Any]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Masked AdamW on dense float64 weights, as plainly as it can be written.

    Retired entries are the weights that the mask no longer covers: they just stay. Newcomers have
    m = 0, v = the largest of their matrix, and a first update of at most the learning rate.

    Returns:
        The weights and the masks after the last step.
    """
    dense = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
    weights = {name: dense.get_submodule(name).weight for name in start}
    for parameter in dense.parameters():
        parameter.requires_grad_(False)
    for name, weight in weights.items():
        weight.data.copy_(start[name])
        weight.requires_grad_(True)
    masks = {name: principal_mask(w.data, RANK, counts[name]) for name, w in weights.items()}
    first = {name: torch.zeros_like(w) for name, w in weights.items()}
    second = {name: torch.zeros_like(w) for name, w in weights.items()}
    clock = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1e-3)
    schedule = get_scheduler("linear", clock, num_warmup_steps=3, num_training_steps=len(batches))
    beta1, beta2, eps = 0.9, 0.95, 1e-6
    for step, (batch, items) in enumerate(batches, start=1):
        logits = dense(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].reshape(-1, logits.shape[-1]),
            batch["labels"][:, 1:].reshape(-1),
            ignore_index=-100,
            reduction="sum",
        )
        (loss / items).backward()
        gradients = {name: w.grad * masks[name] for name, w in weights.items()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        scale = min(1.0, float(1.0 / (norm + 1e-6)))
        rate = schedule.get_last_lr()[0]
        for name, weight in weights.items():
            gradient = gradients[name] * scale
            fresh = (first[name] == 0) & (step > 1)
            first[name] = beta1 * first[name] + (1 - beta1) * gradient
            second[name] = beta2 * second[name] + (1 - beta2) * gradient**2
            update = (first[name] / (1 - beta1**step)) / (
                (second[name] / (1 - beta2**step)).sqrt() + eps
            )
            update = torch.where(fresh, update.clamp(-1, 1), update)
            weight.data -= rate * update * masks[name]
            weight.grad = None
        clock.step()
        schedule.step()
        if step % INTERVAL == 0 and step < len(batches):
            for name, weight in weights.items():
                new = principal_mask(weight.data, RANK, counts[name])
                largest = second[name][masks[name]].max()
                stay = new & masks[name]
                first[name] = torch.where(stay, first[name], 0)
                second[name] = torch.where(stay, second[name], torch.where(new, largest, 0))
                masks[name] = new
    return {name: weight.data for name, weight in weights.items()}, masks


@pytest.mark.parametrize(
    ("optim", "weights_band", "learned_band"),
    swept(
        [
            ("sparse_adamw", 1e-7, 1e-6),
            ("adamw_torch", 1e-7, 1e-6),
            ("sparse_adamw_8bit", 0.02, 0.12),
        ],
        ("sparse_adamw", 1e-7, 1e-6),
    ),
)
def test_sixty_steps_equal_a_dense_masked_adamw_in_float64(
    base: Path, tmp_path: Path, optim: str, weights_band: float, learned_band: float
) -> None:
    """With three refreshes inside. The bands: relative norm of the difference of each effective
    weight, and of what was learned alone."""
    lift = LiftConfig(density=0.05, approx_rank=RANK, refresh_interval=INTERVAL, retired_limit=None)
    model = get_lift_model(load(base), lift, progress=False)
    layers = lift_layers(model)
    start = {name: layer.effective.rows(0, layer.out_features) for name, layer in layers.items()}
    trainer = Recorder(
        model=model,
        args=settings(tmp_path, max_steps=STEPS, optim=optim),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=make_tokenizer(),
    )
    trainer.train()
    assert len(trainer.refreshes) == 3
    assert all(report.churn > 0 for report in trainer.refreshes)
    counts = {name: layer.index.count for name, layer in layers.items()}
    wanted, masks = simulate(base, start, counts, trainer.batches)
    for name, layer in layers.items():
        difference = layer.effective.rows(0, layer.out_features).double() - wanted[name]
        learned = wanted[name] - start[name]
        got = torch.zeros(masks[name].numel(), dtype=torch.bool)
        got[layer.index.to_flat()] = True
        if optim != "sparse_adamw_8bit":  # whose masks part with its weights
            assert torch.equal(got.view_as(masks[name]), masks[name]), name
        assert difference.norm() <= weights_band * wanted[name].norm(), name
        assert difference.norm() <= learned_band * learned.norm(), name
