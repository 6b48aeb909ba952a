"""Is a re-quantized model still the one that was trained? Asked of what runs it.

Three things can go wrong on the way to a file that others run, and each has its own comparison:

* the file is another model (a converter's mistake, another tokenizer): its 16-bit form must give
  the logits of base + adapter but for rounding, and the runtime's tokenizer the same tokens;
* quantization makes the model worse: greedy answers and perplexity of the file beside those of
  base + adapter and of the base;
* quantization undoes what was learned, which is a small change of few weights: of what training
  took off the loss, the share that is left in the file,

      (loss(base) - loss(file)) / (loss(base) - loss(base + adapter)),

  and of the changed weights, the share that kept their change (`Change`). The first counts what
  quantization costs the base too; the perplexity of the base, quantized alike, stands beside it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.evaluation.verify import BOUNDS
from leanlift.requantized.asked import Asked, Found
from leanlift.requantized.change import Change
from leanlift.requantized.runtime import Runtime


@dataclass(frozen=True)
class SameModel:
    """The 16-bit form against base + adapter.

    Attributes:
        difference: the largest difference of a logit.
        bound: what it may be.
        effect: the largest change that the adapter makes to a logit of the base.
        tokens: whether the runtime takes the texts apart as the model's tokenizer does; None: it
            has no tokenizer of its own.
    """

    difference: float
    bound: float
    effect: float
    tokens: bool | None


@dataclass(frozen=True)
class Comparison:
    """What was found.

    Attributes:
        runtime: what ran the file, in a sentence.
        kind: of the file.
        rows, tokens: that the losses are of.
        whose: what the rows are, in words.
        same: of the 16-bit form.
        equal, answers: greedy answers that are those of base + adapter, of how many.
        base, trained, written: losses of the base, of base + adapter, and of what was written.
        base_written: of the base, quantized alike; None: nothing was quantized.
        change: of the weights; None: nothing was quantized.
    """

    runtime: str
    kind: str
    rows: int
    tokens: int
    whose: str
    same: SameModel
    equal: int
    answers: int
    base: float
    trained: float
    written: float
    base_written: float | None = None
    change: Change | None = None

    @property
    def kept(self) -> float | None:
        """Of what training took off the loss, what is left; None: it took off nothing here."""
        learned = self.base - self.trained
        return (self.base - self.written) / learned if learned > 0 else None

    def lines(self) -> list[str]:
        """As a person reads it."""
        lines = [
            f"Checked with {self.runtime} on {self.rows} {self.whose} "
            f"({self.tokens:,} trained tokens):",
            f"  in 16 bits   logits differ by {self.same.difference:.3g} at most (bound "
            f"{self.same.bound:.3g}; the adapter changes them by up to {self.same.effect:.3g})"
            + {None: "", True: "; the same tokens", False: ""}[self.same.tokens],
        ]
        if self.answers:
            lines.append(
                f"  answers      {self.equal} of {self.answers} greedy ones are those of base + "
                "adapter"
            )
        also = ""
        if self.base_written is not None:
            also = f"; base in {self.kind} {_perplexity(self.base_written)}"
        lines.append(
            f"  perplexity   base {_perplexity(self.base)}, base + adapter "
            f"{_perplexity(self.trained)}, {self.kind} {_perplexity(self.written)}{also}"
        )
        return [*lines, f"  learned      {self._kept_words()}"]

    def _kept_words(self) -> str:
        kept = self.kept
        words = "training did not lower the loss of these rows, so no share of it can be kept"
        if kept is not None:
            words = f"{kept:.1%} of what training took off the loss is kept"
        if self.change is not None and self.change.changed:
            words += (
                f"; {self.change.share:.0%} of {self.change.changed:,} changed weights keep at "
                "least half of their change"
            )
        return words


def same_model(
    model: Runtime, asked: Asked, found: list[Tensor], before: Found, after: Found, dtype: str
) -> SameModel:
    """Compare the 16-bit form with base + adapter.

    Args:
        model: the 16-bit form.
        asked: what was asked.
        found: its logits.
        before, after: the base, and base + adapter.
        dtype: the coarsest of those that computed.

    Raises:
        UserError: another tokenizer, or logits that differ by more than rounding explains.
    """
    tokens = _same_tokens(model, asked)
    largest = max(float(logits.abs().max()) for logits in after.logits)
    result = SameModel(
        _difference(found, after.logits),
        BOUNDS[dtype] * largest,
        _difference(before.logits, after.logits),
        tokens,
    )
    if not result.difference <= result.bound:  # a NaN is no pass
        raise UserError(
            f"the 16-bit file is not what adapter and base compute: logits differ by up to "
            f"{result.difference:.3g}, more than the {result.bound:.3g} that rounding explains, so "
            "nothing was written; --no_verify writes it all the same."
        )
    return result


def compare(
    runtime: str,
    kind: str,
    asked: Asked,
    same: SameModel,
    losses: tuple[Found, Found, Found],
    base_written: float | None = None,
    change: Change | None = None,
) -> Comparison:
    """Put together what was found of the base, of base + adapter, and of what was written."""
    before, after, written = losses
    pairs = zip(written.answers, after.answers, strict=True)
    return Comparison(
        runtime=runtime,
        kind=kind,
        rows=len(asked.samples),
        tokens=asked.trained,
        whose=asked.whose,
        same=same,
        equal=sum(one == other for one, other in pairs),
        answers=len(after.answers),
        base=before.loss,
        trained=after.loss,
        written=written.loss,
        base_written=base_written,
        change=change,
    )


def _same_tokens(model: Runtime, asked: Asked) -> bool | None:
    """Whether texts of the rows become the same tokens; None: the runtime has no tokenizer.

    Raises:
        UserError: they do not; names the text.
    """
    for text in asked.texts():
        theirs = model.tokenize(text)
        if theirs is None:
            return None
        ours = list(asked.tokenizer(text, add_special_tokens=False)["input_ids"])
        if ours != theirs:
            raise UserError(
                f"llama.cpp takes a text apart into other tokens than the model's tokenizer does "
                f"({len(theirs)} and {len(ours)}, of {text[:60]!r}), so it would answer worse than "
                "trained, and nothing was written; --no_verify writes it all the same."
            )
    return True


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest absolute difference; NaN where either has one. Rows of the embedding that no
    token has may be in one of them alone."""
    words = min(logits.shape[1] for logits in (*ours, *theirs))
    pairs = zip(ours, theirs, strict=True)
    return float(torch.stack([(a[:, :words] - b[:, :words]).abs().max() for a, b in pairs]).max())


def _perplexity(loss: float) -> str:
    return f"{math.exp(min(loss, 700.0)):.4g}"
