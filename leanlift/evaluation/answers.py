"""What a causal LM makes of tokenized rows: the loss of their trained tokens, greedy answers.

Batches are padded on the left and masked by length, never by token id, so that a pad token which
is also the end token changes nothing; positions are counted from each row's own first token.
Greedy is the largest logit, whatever the model's generation config says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from leanlift.data.tokenizer import as_ids
from leanlift.data.tokens import IGNORED

LOGITS = 2**28
"""Logits of a batch, at most, where it is of more than one row: half a GiB in 16 bits. Windows of a
text predict all their tokens, and a vocabulary may have 150,000."""


@dataclass(frozen=True)
class Sample:
    """One tokenized row.

    Attributes:
        prompt: token ids that are given.
        whole: prompt and completion with its end token.
        labels: as many as `whole`; -100 does not count in the loss.
        expected: the completion as text; None where there is no prompt to generate from.
        answer: what the `answer` column holds, or None.
        row: the number of the row that it is of: a chat has one for each turn of the assistant.
    """

    prompt: list[int]
    whole: list[int]
    labels: list[int]
    expected: str | None
    answer: str | None = None
    row: int = 0

    @property
    def start(self) -> int:
        """Where the first token is that counts; the very first of a text is never predicted."""
        counted = (i for i, label in enumerate(self.labels) if i and label != IGNORED)
        return next(counted, len(self.labels))

    @property
    def trained(self) -> int:
        """Tokens that count in the loss."""
        return sum(label != IGNORED for label in self.labels[1:])


@torch.no_grad()
def sum_of_losses(
    model: Any,
    samples: Sequence[Sample],
    batch_size: int,
    progress: bool = False,
    name: str = "",
) -> tuple[float, int]:
    """Summed cross-entropy of the trained tokens, in nats, and their number."""
    found = losses_of(model, samples, batch_size, progress, name)
    return sum(found), sum(sample.trained for sample in samples)


@torch.no_grad()
def losses_of(
    model: Any,
    samples: Sequence[Sample],
    batch_size: int,
    progress: bool = False,
    name: str = "",
) -> list[float]:
    """Summed cross-entropy of each sample's trained tokens, in nats; 0 where there are none. Of
    long texts fewer than `batch_size` are taken at a time, as `LOGITS` says."""
    losses = [0.0] * len(samples)
    trained = [i for i, sample in enumerate(samples) if sample.trained]
    only_last = "logits_to_keep" in inspect.signature(model.forward).parameters
    longest = max((len(samples[i].whole) - samples[i].start + 1 for i in trained), default=1)
    words = int(getattr(model.config.get_text_config(), "vocab_size", 1) or 1)
    size = max(1, min(batch_size, LOGITS // (longest * words)))
    for batch in _batches(
        trained, lambda i: len(samples[i].whole), size, _bar(name, "loss"), progress
    ):
        inputs = pad_left([samples[i].whole for i in batch], model.device)
        spans = [len(samples[i].whole) - samples[i].start for i in batch]
        kept = max(spans) + 1  # one more position, to predict from
        logits = model(**inputs, use_cache=False, **({"logits_to_keep": kept} if only_last else {}))
        for i, row, n in zip(batch, logits.logits, spans, strict=True):
            labels = torch.tensor(samples[i].labels[-n:], device=row.device)
            found = F.cross_entropy(
                row[-n - 1 : -1].float(), labels, ignore_index=IGNORED, reduction="sum"
            )
            losses[i] = float(found)
    return losses


@torch.no_grad()
def greedy_answers(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    progress: bool = False,
    name: str = "",
) -> list[str]:
    """The greedy text after each prompt, up to the end token, in the order of `samples`."""
    if not samples:
        return []
    answers = [""] * len(samples)
    ends = end_tokens(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    order = range(len(samples))
    with greedily(model, ends, pad, max_new_tokens) as config:
        for batch in _batches(
            order, lambda i: len(samples[i].prompt), batch_size, _bar(name, "answers"), progress
        ):
            inputs = pad_left([samples[i].prompt for i in batch], model.device)
            inputs.pop("position_ids")  # generate counts them from the mask, as pad_left does
            output = model.generate(**inputs, generation_config=config)
            new = output[:, inputs["input_ids"].shape[1] :].tolist()
            for i, row in zip(batch, new, strict=True):
                stop = next((at for at, token in enumerate(row) if token in ends), len(row))
                answers[i] = tokenizer.decode(row[:stop], skip_special_tokens=True)
    return answers


@contextmanager
def greedily(model: Any, ends: list[int], pad: int, new: int) -> Iterator[GenerationConfig]:
    """A generation config of token ids alone, also in place of the model's own: `generate` fills
    what another one leaves open from that (penalties, beams, forced and suppressed tokens)."""
    config = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new, eos_token_id=ends, pad_token_id=pad
    )
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad)
    try:
        yield config
    finally:
        model.generation_config = own


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> dict[str, Tensor]:
    """`input_ids`, `attention_mask`, `position_ids` [B, T]: padding first, masked by length."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        ids[number, width - len(row) :] = torch.tensor(row)
        mask[number, width - len(row) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
    }


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Where generation stops: what the model's generation config says, and the end token."""
    said = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return sorted({*as_ids(tokenizer.eos_token_id), *as_ids(said)})


def _bar(name: str, what: str) -> str:
    return f"{name}: {what}" if name else what


def _batches(
    items: Sequence[Any], length: Any, size: int, what: str, progress: bool
) -> Iterator[list[Any]]:
    """Batches of similar length, the longest first: what does not fit shows at once."""
    ordered = sorted(items, key=length, reverse=True)
    shown = None if progress else True  # None: on a terminal alone
    with tqdm(total=len(ordered), desc=what, unit="row", leave=False, disable=shown) as bar:
        for start in range(0, len(ordered), size):
            batch = ordered[start : start + size]
            yield batch
            bar.update(len(batch))
