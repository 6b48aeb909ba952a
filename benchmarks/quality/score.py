"""Loss and greedy exact match of a model on rows, in one pass.

Greedy generation gives exactly a reference completion if and only if, after each of its
prefixes, the likeliest next token is the reference's next one. All of that can be read from one
forward pass over prompt and completion, which takes a tenth of the time of generating; a test
holds it against generation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.quality.domain import IGNORED, Rows


@dataclass(frozen=True)
class Score:
    """On one set of rows.

    Attributes:
        exact: share of rows whose greedy completion is the reference.
        token: share of trained tokens that are the likeliest after the reference's prefix.
        loss: nats per trained token.
    """

    exact: float
    token: float
    loss: float


@torch.no_grad()
def score(model: Any, rows: Rows, size: int = 256) -> Score:
    """Measure a model in the mode it is in.

    The methods have no dropout, so training mode computes the same; and in evaluation mode a CPU
    forward of bitsandbytes' Linear4bit repacks its weight.
    """
    device = next(model.parameters()).device
    exact, right, tokens, loss = 0, 0, 0, 0.0
    for chosen in torch.arange(len(rows)).split(size):
        batch = rows.batch(chosen)
        ids, labels = batch["input_ids"].to(device), batch["labels"][:, 1:].to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        counted = labels != IGNORED
        hit = logits.argmax(-1) == labels
        exact += int((hit | ~counted).all(1).sum())
        right += int(hit[counted].sum())
        tokens += int(counted.sum())
        loss += float(F.cross_entropy(logits[counted], labels[counted], reduction="sum"))
    return Score(exact / len(rows), right / tokens, loss / tokens)
