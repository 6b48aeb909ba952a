"""What a model is tested on: exact answers of test sets, and the loss of a text.

The paper's suites are judged as leanlift judges answers. PEFT's comparison takes what stands behind
the last "The answer is" (or "####", as GSM8K has it) up to the end of the line, and compares
numbers as numbers, all else as texts. What it calls forgetting is the mean loss per token over the
first 100 texts of FineWiki, of at most 768 tokens each, after training less that of the base
before. Its figures since July 2026 are over the next token, and over the base itself; older ones
are not.

Answers are greedy here, whatever the base's own generation config says.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, DivisionByZero, InvalidOperation
from pathlib import Path
from typing import Any

from benchmarks.quality.paper.rows import PROMPT, pairs
from benchmarks.quality.paper.suites import Suite
from leanlift.data.dataset import load_rows
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import (
    Sample,
    asked_of,
    evaluate_samples,
    greedy_answers,
    sum_of_losses,
    to_samples,
)

TEXT_TOKENS, TEXT_BATCH = 768, 4

MARKS = (
    "The answer is: ", "The answer is ", "The final answer is: ", "The final answer is ", "#### ",
)  # fmt: skip
"""What an answer stands behind; the first of these that a text has."""


def questions(suite: Suite, path: Path, tokenizer: Any, limit: int | None) -> list[Sample]:
    """The rows of a test set, tokenized.

    Raises:
        UserError: rows that cannot be used, or without an answer.
    """
    if not suite.as_peft:
        rows = load_rows(str(path), name="eval")
        if limit is not None:
            rows = rows.select(range(min(limit, len(rows))))
        found = asked_of(to_samples(rows, tokenizer), suite.new_tokens)
        if not found:
            raise UserError(f"{path} has no row with a question and an answer.")
        return found
    samples = []
    for number, (question, answer) in enumerate(pairs(path)):
        if number == limit:
            break
        wanted = stated(answer)
        if wanted is None:
            raise UserError(
                f'row {number} of {path} has no answer behind "####" or "The answer is": expected '
                "the test split of GSM8K."
            )
        ids = tokenizer(PROMPT.format(query=question))["input_ids"]
        samples.append(Sample(list(ids), [], [], answer, wanted))
    return samples


def accuracy(suite: Suite, model: Any, tokenizer: Any, samples: Sequence[Sample]) -> float:
    """The share of test rows that is answered right."""
    if not suite.as_peft:
        found = evaluate_samples(
            model, tokenizer, samples, batch_size=suite.test_batch, max_new_tokens=suite.new_tokens
        ).exact_match
        if found is None:
            raise UserError("a test set has no answer that could be judged.")
        return found
    model.eval()
    texts = greedy_answers(model, tokenizer, samples, suite.test_batch, suite.new_tokens)
    right = [same(stated(text), sample.answer) for text, sample in zip(texts, samples, strict=True)]
    return sum(right) / len(right)


def stated(text: str) -> str | None:
    """What a text says that the answer is; None: nothing."""
    text = text.strip().rstrip(".!?")
    mark = next((mark for mark in MARKS if mark in text), None)
    if mark is None:
        return None
    return text.rpartition(mark)[-1].strip().split("\n", 1)[0].strip(" .!?$%")


def same(found: str | None, wanted: str | None) -> bool:
    """Whether an answer is the wanted one: numbers and fractions by their value."""
    if found is None or wanted is None:
        return False
    values = number(found), number(wanted)
    if None in values:
        return values == (None, None) and found == wanted
    return values[0] == values[1]


def number(text: str) -> float | None:
    """Of a text that is a number, or one over another."""
    over, slash, under = text.partition("/")
    try:
        value = Decimal(over.strip())
        return float(value / Decimal(under.strip()) if slash else value)
    except (InvalidOperation, DivisionByZero, ValueError, OverflowError):
        return None


def text_loss(model: Any, tokenizer: Any, texts: Sequence[str]) -> float:
    """Mean loss per token of the texts, each cut to its first 768 tokens."""
    model.eval()
    cut = [tokenizer(text)["input_ids"][:TEXT_TOKENS] for text in texts]
    samples = [Sample([], ids, ids, None) for ids in cut]
    total, tokens = sum_of_losses(model, samples, TEXT_BATCH)
    return total / tokens
