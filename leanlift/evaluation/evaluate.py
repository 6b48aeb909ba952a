"""How well a causal LM does on rows: loss per trained token, and greedy answers.

The rows are those that training takes, converted and tokenized by the same code, so that what is
measured is what was trained. What a model makes of them is `answers`' affair, how a greedy text is
judged `judge`'s.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

from transformers.utils import logging as transformers_logging
from trl.data_utils import common_prefix_length

from leanlift.data.dataset import a_dataset, tokenized
from leanlift.data.positions import check_positions
from leanlift.data.ready import has_images
from leanlift.data.tokens import Tokenization, Tokens
from leanlift.errors import UserError
from leanlift.evaluation.answers import (
    Sample,
    greedy_answers,
    losses_of,
    pad_left,
    sum_of_losses,
)
from leanlift.rows.judge import (
    check_judge,
    is_right,
    judges_used,
    last_number,
    same_answer,
)
from leanlift.rows.source import Row

logger = logging.getLogger("leanlift")

__all__ = [
    "Evaluation",
    "Measured",
    "Sample",
    "check_options",
    "evaluate",
    "evaluate_samples",
    "greedy_answers",
    "is_right",
    "last_number",
    "measure",
    "pad_left",
    "quiet_loading",
    "same_answer",
    "sum_of_losses",
    "to_samples",
]


@dataclass(frozen=True)
class Evaluation:
    """What was measured.

    Attributes:
        rows: samples; a chat counts once per assistant turn.
        tokens: trained tokens.
        loss: mean over them; None: there was none.
        perplexity: its exponential.
        generated: samples with a greedy answer.
        exact_match: share of the judged ones that are right; None: nothing was judged.
        judged_by: "answer" where there is an answer column, else "text".
        judged: samples that want something of the judge's kind.
        judge: "number", "letter", "label", "text" or "contains"; several are joined by "+".
    """

    rows: int
    tokens: int
    loss: float | None
    perplexity: float | None
    generated: int
    exact_match: float | None
    judged_by: str
    judged: int = 0
    judge: str = "text"

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary; null for a loss that is not finite, for which JSON has no
        form."""
        held = asdict(self)
        fine = self.loss is None or math.isfinite(self.loss)
        return held if fine else {**held, "loss": None, "perplexity": None}


@dataclass(frozen=True)
class Measured:
    """An evaluation, and what it was made from.

    Attributes:
        evaluation: the numbers.
        answers: greedy texts of the samples that were asked, in their order.
        right: whether each was; None: it could not be judged.
        losses: summed over the trained tokens of each sample.
        seconds: that it took.
    """

    evaluation: Evaluation
    answers: list[str]
    right: list[bool | None]
    losses: list[float]
    seconds: float


def evaluate(
    model: Any,
    tokenizer: Any,
    rows: Any,
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    progress: bool = True,
    how: Tokenization | None = None,
    judge: str = "auto",
) -> Evaluation:
    """Measure a model on rows.

    Args:
        model: a causal LM, stock or attached; its mode is restored afterwards.
        tokenizer: its tokenizer.
        rows: a `Dataset` or list of dicts as for training, with or without `answer`.
        batch_size: rows at a time.
        max_new_tokens: where a greedy answer is cut off; 0: the loss alone.
        progress: whether to show bars.
        how: the tokenization; by default `Tokenization.of(tokenizer)`.
        judge: how answers are judged, one of `JUDGES`.

    Raises:
        UserError: no rows, rows that cannot be used, or an option that makes no sense.
    """
    check_options(batch_size, max_new_tokens, judge)
    samples = to_samples(rows, tokenizer, how)
    return evaluate_samples(
        model,
        tokenizer,
        samples,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        progress=progress,
        judge=judge,
    )


def check_options(batch_size: int, max_new_tokens: int, judge: str = "auto") -> None:
    """Raises a UserError for an option that makes no sense."""
    check_judge(judge)
    if batch_size < 1 or max_new_tokens < 0:
        raise UserError(
            f"expected a batch_size of at least 1 and max_new_tokens of 0 or more, got "
            f"{batch_size} and {max_new_tokens}."
        )


def evaluate_samples(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 256,
    progress: bool = True,
    judge: str = "auto",
) -> Evaluation:
    """`evaluate` for rows that `to_samples` has tokenized, which needs no model."""
    asked = asked_of(samples, max_new_tokens)
    return measure(
        model, tokenizer, samples, asked, batch_size, max_new_tokens, judge, progress
    ).evaluation


def asked_of(samples: Sequence[Sample], max_new_tokens: int) -> list[Sample]:
    """The samples that a greedy answer is wanted of."""
    return [s for s in samples if s.expected is not None and s.prompt and max_new_tokens]


def measure(
    model: Any,
    tokenizer: Any,
    samples: Sequence[Sample],
    asked: Sequence[Sample],
    batch_size: int,
    max_new_tokens: int,
    judge: str = "auto",
    progress: bool = False,
    name: str = "",
    data: str = "",
) -> Measured:
    """Loss over `samples` and greedy answers of `asked`; `name` of the model stands before bars,
    that of the dataset in messages."""
    longest = max((len(sample.whole) for sample in samples), default=0)
    answered = max((len(sample.prompt) + max_new_tokens for sample in asked), default=0)
    of = f" of {data}" if data else ""
    check_positions(model, longest, f"the longest row{of}", "leave longer ones out")
    check_positions(
        model, answered, f"the longest prompt{of} with its answer", "set a lower max_new_tokens"
    )
    was_training, started = model.training, time.perf_counter()
    model.eval()
    try:
        losses = losses_of(model, samples, batch_size, progress, name)
        answers = greedy_answers(
            model, tokenizer, asked, batch_size, max_new_tokens, progress, name
        )
    finally:
        model.train(was_training)
    right = [is_right(text, sample, judge) for text, sample in zip(answers, asked, strict=True)]
    judged = [found for found in right if found is not None]
    tokens = sum(sample.trained for sample in samples)
    loss = sum(losses) / tokens if tokens else None
    _say_what_is_not_finite(losses, f"{name or type(model).__name__}{f' on {data}' * bool(data)}")
    evaluation = Evaluation(
        rows=len(samples),
        tokens=tokens,
        loss=loss,
        perplexity=None if loss is None else math.exp(min(loss, 700.0)),
        generated=len(asked),
        exact_match=sum(judged) / len(judged) if judged else None,
        judged_by="answer" if any(s.answer is not None for s in samples) else "text",
        judged=len(judged),
        judge="+".join(sorted(judges_used(asked, judge))) or judge,
    )
    return Measured(evaluation, answers, right, losses, time.perf_counter() - started)


def _say_what_is_not_finite(losses: Sequence[float], where: str) -> None:
    """Warn of rows that a model makes no finite loss of: there is none of all of them then."""
    wrong = sum(not math.isfinite(loss) for loss in losses)
    if wrong:
        logger.warning(
            "%s: the loss of %d of %d rows is not finite, so there is none of all: the weights are "
            "damaged, or too large for the dtype of the products (--dtype bfloat16, float32).",
            where,
            wrong,
            len(losses),
        )


def to_samples(
    rows: Any,
    tokenizer: Any,
    how: Tokenization | None = None,
    name: str = "eval",
    window: int | None = None,
) -> list[Sample]:
    """Tokenize rows as training does. What rows lose on the way is logged.

    A row's answer is that of its last turn: earlier turns of such a chat are not asked for.

    Args:
        rows: a `Dataset` or list of dicts.
        tokenizer, how: of the model.
        name: of the dataset, for messages; it begins with "eval".
        window: most tokens of a window of a text.

    Raises:
        UserError: no rows, or rows that cannot be used.
    """
    rows, how = a_dataset(rows, name), how or Tokenization.of(tokenizer)
    if has_images(rows):
        raise UserError(
            f"the {name} dataset has images, and what is measured here is text: leave their column "
            "out, or evaluate while training, with eval_dataset_name."
        )
    given = list(rows["answer"]) if "answer" in rows.column_names else None
    samples: list[Sample] = []
    before = -1
    for number, example, tokens in tokenized(rows, how, name, window):
        answer = None if given is None or given[number] is None else str(given[number])
        if answer is not None and number == before:
            samples[-1] = replace(samples[-1], expected=None, answer=None)
        expected = _expected(example, tokens, how)
        samples.append(Sample(tokens.prompt, tokens.ids, tokens.labels, expected, answer, number))
        before = number
    return samples


def _expected(example: Row, tokens: Tokens, how: Tokenization) -> str | None:
    """What an answer is compared with: a completion's text; of a chat's, tool calls and all, what
    its template makes of it up to the end token."""
    completion = example.get("completion")
    if completion is None or not tokens.prompt:
        return None
    if isinstance(completion, str):
        return completion.removesuffix(how.tokenizer.eos_token)
    trained = tokens.ids[common_prefix_length(tokens.prompt, tokens.ids) :]
    stop = next((at for at, token in enumerate(trained) if token in how.ends), len(trained))
    return str(how.tokenizer.decode(trained[:stop], skip_special_tokens=True))


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without transformers' own bars while models are loaded; they are put back."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()
