"""How long examples may be, what is done with those that are longer, and what is said of it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError

logger = logging.getLogger("leanlift")

STRATEGIES = ("bfd", "bfd_split", "wrapped")
CUTTING = ("bfd",)
"""Packing strategies that cut what is longer than a pack; the others spread it over several."""


@dataclass(frozen=True)
class LengthReport:
    """What became of a dataset's rows.

    Attributes:
        rows: examples in all.
        longest: tokens of the longest one.
        truncated: examples longer than `max_length`; they lose their end (or start), unless
            they are packed by a strategy that splits.
        untrained: examples without a single trained token (all labels -100), which are dropped.
        max_length: as in `SFTConfig`.
        split: whether what is too long is split over several packs instead of being cut.
        unended: examples that train no end token.
        notes: what rows lost or had changed when they were converted.
    """

    name: str
    rows: int
    longest: int
    truncated: int
    untrained: int
    max_length: int | None
    split: bool = False
    unended: int = 0
    notes: tuple[str, ...] = ()

    @property
    def kept(self) -> int:
        """Tokens of the longest one as it is trained."""
        return self.longest if self.max_length is None else min(self.longest, self.max_length)

    def __str__(self) -> str:
        text = f"{self.name}: {self.rows} examples, the longest has {self.longest} tokens"
        if self.truncated:
            fate = "split over several packs" if self.split else "cut"
            text += (
                f"; {self.truncated} are longer than max_length={self.max_length} and are {fate}"
            )
        if self.untrained:
            text += f"; {self.untrained} have no token to train on and are dropped"
        if self.unended:
            text += f"; {self.unended} train no end token"
        return "; ".join([text, *self.notes]) + "."


@dataclass(frozen=True)
class Cut:
    """What is done with examples that are too long.

    Attributes:
        max_length: in tokens; None: any length.
        keep_end: whether the start is cut off.
        split: whether they are left whole, for a packing that splits them.
    """

    max_length: int | None = None
    keep_end: bool = False
    split: bool = False

    @classmethod
    def of(cls, sft: Any, packing: bool) -> Cut:
        """As training arguments have it."""
        return cls(
            sft.max_length,
            sft.truncation_mode == "keep_end",
            packing and sft.packing_strategy not in CUTTING,
        )

    def __call__(self, ids: list[int]) -> list[int]:
        if self.max_length is None or self.split:
            return ids
        return ids[-self.max_length :] if self.keep_end else ids[: self.max_length]


def check_row_settings(sft: Any) -> None:
    """Refuse what TRL would refuse after the base is loaded, or ignore.

    Raises:
        UserError: settings that exclude each other, or are none.
    """
    packs = sft.packing or sft.eval_packing
    unknown = set(sft.dataset_kwargs or ()) - {"skip_prepare_dataset"}
    problems = {
        "packing needs a max_length, the length of a pack": packs and sft.max_length is None,
        "padding_free without packing does not keep to max_length: set packing, or max_length to "
        "none": sft.padding_free and not sft.packing and sft.max_length is not None,
        f"packing_strategy {sft.packing_strategy!r} is none of {', '.join(STRATEGIES)}": (
            sft.packing_strategy not in STRATEGIES
        ),
        f"truncation_mode {sft.truncation_mode!r} is neither keep_start nor keep_end": (
            sft.truncation_mode not in ("keep_start", "keep_end")
        ),
        f"dataset_kwargs has skip_prepare_dataset alone, not {', '.join(sorted(unknown))}": unknown,
        f"max_length {sft.max_length} is not positive": (
            sft.max_length is not None and sft.max_length < 1
        ),
    }
    for problem, found in problems.items():
        if found:
            raise UserError(f"these settings do not work: {problem}.")


def skips_preparation(sft: Any) -> bool:
    """Whether rows go to the collator as they are."""
    return bool((sft.dataset_kwargs or {}).get("skip_prepare_dataset"))


def say(report: LengthReport, how: Tokenization) -> None:
    """Log a report: as a warning where something was lost; and that nothing trains to stop."""
    loud = report.truncated or report.untrained or report.unended
    loud = loud or any(not note.startswith("columns not used") for note in report.notes)
    (logger.warning if loud else logger.info)("%s", report)
    if report.unended == report.rows:
        ends = how.tokenizer.convert_ids_to_tokens(sorted(how.ends))
        logger.warning(
            "no end token is trained: no %s row has %s in what is trained, so the model will not "
            "learn to stop; end the assistant's turns with it in the chat template, or name the "
            "token that ends them with eos_token.",
            report.name,
            " or ".join(map(repr, ends)),
        )
