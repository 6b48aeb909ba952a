"""Domain (b): real text from files that the user gives.

The base is a language model of the question-and-answer rows of one file; the target is the worked
arithmetic problems of another (a GSM8K or MATH-10K export: JSON rows with instruction, input,
output, and answer if there is one). A model of this size gets few problems right, so losses are
what to compare: the target's, and the source's as perplexity.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from benchmarks.quality.domain import Domain, Rows
from leanlift.data.dataset import load_rows
from leanlift.errors import UserError
from leanlift.evaluation.evaluate import Sample, greedy_answers, is_right, last_number

PAD, END = "<pad>", "</s>"
HELD_OUT = 10  # of ten rows, one is held out for validation and one for the test
Pair = tuple[str, str]


def text(
    source: Path,
    data: Path,
    *,
    vocabulary: int,
    longest: int,
    batch: int,
    test: int,
    generated: int,
    new_tokens: int,
) -> Domain:
    """The domain.

    Args:
        source: file of the rows that the base is pretrained on.
        data: file of the rows that are taught.
        vocabulary: tokens of the byte-level BPE that is trained on the source.
        longest: tokens of a row; what is longer is cut.
        batch: rows of a pretraining batch.
        test: rows for validation, test and source, at most.
        generated: test rows answered by generation.
        new_tokens: of an answer.
    """
    known, taught = _split(_pairs(source)), _split(_pairs(data))
    tokenizer = _tokenizer([q + a for q, a in known["train"]], vocabulary)

    def rows(pairs: list[Pair], whole: bool = False) -> Rows:
        ids = [(tokenizer(q)["input_ids"], tokenizer(a + END)["input_ids"]) for q, a in pairs]
        ids = [(q[-longest // 2 :], a) for q, a in ids]
        return Rows.of([([], q + a) if whole else (q, a) for q, a in ids], longest)

    def pretraining(seed: int) -> Iterator[dict[str, Tensor]]:
        return rows(known["train"], whole=True).batches(batch, seed)

    asked = [
        Sample(tokenizer(q)["input_ids"], [], [], a, str(last_number(a)))
        for q, a in taught["test"]
        if last_number(a) is not None
    ][:generated]

    def answers(model: Any) -> float:
        found = greedy_answers(model, tokenizer, asked, 32, new_tokens)
        return sum(is_right(t, s) for t, s in zip(found, asked, strict=True)) / max(1, len(asked))

    return Domain(
        name=f"text-{source.stem}-to-{data.stem}",
        vocabulary=len(tokenizer),
        end=tokenizer.eos_token_id,
        pretraining=pretraining,
        train=rows(taught["train"]),
        valid=rows(taught["valid"][:test]),
        test=rows(taught["test"][:test]),
        source={source.stem: rows(known["test"][:test], whole=True)},
        answers=answers,
    )


def _pairs(path: Path) -> list[Pair]:
    """Question and answer of each row.

    Raises:
        UserError: a row without one of them.
    """
    pairs = []
    for number, row in enumerate(load_rows(str(path))):
        if not all(isinstance(row.get(key), str) for key in ("instruction", "output")):
            raise UserError(f"row {number} of {path} has no texts as instruction and output.")
        extra = row.get("input") or ""
        question = f"Q: {row['instruction']}" + (f"\n{extra}" if extra else "")
        pairs.append((question + "\nA:", " " + row["output"].strip().removeprefix("A:").strip()))
    return pairs


def _split(pairs: list[Pair]) -> dict[str, list[Pair]]:
    pairs = list(dict.fromkeys(pairs))
    random.Random(0).shuffle(pairs)
    n = len(pairs) // HELD_OUT
    return {"test": pairs[:n], "valid": pairs[n : 2 * n], "train": pairs[2 * n :]}


def _tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=[PAD, END],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=END)
