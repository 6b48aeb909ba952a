"""Rows with images, made ready for TRL, which puts them through the model's processor by batches.

A chat becomes a prompt and a completion for each turn of the assistant, as rows of text do, with a
place for each image in the prompt; what is trained is the completion. Images stay where they are
until a batch is made. Such rows are never cut: a cut could part an image from its tokens. So that
nothing of this shows in the middle of a run, every place for an image is counted, every file is
looked for, and some rows are put through the processor before the base is loaded.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import AutoProcessor, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from leanlift.data.pictures import IMAGES, apart, opened
from leanlift.data.tokens import IGNORED
from leanlift.errors import UserError, first_line
from leanlift.rows.examples import ExampleReader
from leanlift.rows.images import placeholders, texts_of, with_placeholders
from leanlift.rows.source import Row, plain_rows

logger = logging.getLogger("leanlift")

TRIED = 16
"""Rows that are put through the processor beforehand: half of them spread over all, by a step that
falls in with no turns; the others those with the longest texts, and with the most images."""

GOLDEN = (5**0.5 - 1) / 2

PLACES = ("image_token", "boi_token", "fake_image_token", "image_placeholder_token")
"""What processors call the token that stands for an image in a text."""

PACKAGES = ("torchvision", "num2words")
"""What processors need beside Pillow: those that take videos too, and Pixtral's."""


@dataclass(frozen=True)
class ImageRows:
    """Examples with images, for TRL's collator.

    Attributes:
        data: of prompt and completion, or messages, and images.
        longest: tokens of the longest example that was tried.
        tried: how many were.
        fullest: of these the one with the largest images, as TRL's collator makes a batch of it.
    """

    data: Dataset
    longest: int
    tried: int
    fullest: dict[str, Any]


def load_processor(
    source: str | Path, trust_remote_code: bool = False, revision: Any = None
) -> Any:
    """A processor as stock transformers loads it.

    Raises:
        UserError: there is none that takes images, or what it needs is not installed.
    """
    _check_pillow()
    try:
        processor: Any = AutoProcessor.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each processor has its own ways to miss a file or a package
        package = _missing(error)
        why = f"it needs the package {package}: pip install {package}" if package else ""
        raise UserError(
            f"the processor of {source}, which its rows with images need, cannot be loaded: "
            f"{why or first_line(error).rstrip('.')}."
        ) from error
    if not sees(processor):
        raise UserError(
            f"{source} has no processor of images (no preprocessor_config.json), and the rows have "
            "images: name a checkpoint that has its processor's files."
        )
    return processor


def sees(processing_class: Any) -> bool:
    """Whether it is a processor that takes images."""
    return (
        isinstance(processing_class, ProcessorMixin)
        and getattr(processing_class, "image_processor", None) is not None
    )


def _missing(error: Exception) -> str | None:
    """The package that is missing, by what transformers says; None: it says something else."""
    found = re.search(r"requires the (\w+) library|Package `(\w+)` is required", str(error))
    package = (found[1] or found[2]).lower() if found else None
    return package if package in PACKAGES else None


def _check_pillow() -> None:
    if find_spec("PIL") is None:
        raise UserError("rows with images need the package Pillow: pip install pillow.")


def check_image_settings(sft: Any, format: Any) -> None:
    """Refuse settings that rows with images cannot have.

    Raises:
        UserError: there is one.
    """
    eval_packing = getattr(sft, "eval_packing", None)
    problems = {
        "packing": sft.packing or eval_packing,
        "padding_free": sft.padding_free,
        "assistant_only_loss": sft.assistant_only_loss,
        "pad_to_multiple_of": sft.pad_to_multiple_of,
        "formatting_func": format is not None,
        "skip_prepare_dataset": (sft.dataset_kwargs or {}).get("skip_prepare_dataset"),
    }
    wrong = [name for name, found in problems.items() if found]
    if wrong:
        raise UserError(f"rows with images cannot be trained with {wrong[0]}: leave it out.")
    if getattr(sft, "chat_template_path", None):
        raise UserError(
            "chat_template_path is a tokenizer's, and rows with images are put into the template "
            "of the processor: leave it out, or put the template into the base's files."
        )


class Decoded:
    """The transform of `ImageRows`: examples out of JSON, and as many images as they have places
    for."""

    def __init__(self, single: bool) -> None:
        self.single = single

    def __call__(self, batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        made = {key: [json.loads(text) for text in batch[key]] for key in batch if key != IMAGES}
        if IMAGES in batch:
            lists = [self._listed(each) for each in batch[IMAGES]]
            before = made.get("prompt") or made.get("messages") or [""] * len(lists)
            made[IMAGES] = [
                [opened(one) for one in found[: _wanted(turns)]]
                for found, turns in zip(lists, before, strict=True)
            ]
        return made

    def _listed(self, found: Any) -> list[Any]:
        if found is None:
            return []
        return [found] if self.single else list(found)


def _wanted(turns: Any) -> int | None:
    """How many of a row's images an example has places for; None: all of them."""
    return None if isinstance(turns, str) else placeholders(turns)


def image_rows(rows: Any, processor: Any, name: str, how: Any) -> ImageRows:
    """Examples of rows with images.

    Args:
        rows: a `Dataset` or list of dicts.
        processor: of the base, its tokenizer prepared.
        name: "train" or "eval", for messages.
        how: the tokenization of rows of text.

    Raises:
        UserError: rows that cannot be used.
    """
    _check_pillow()
    if isinstance(rows, IterableDataset):
        raise UserError(
            f"the {name} dataset is a stream with images, which have to be looked at before: give "
            "it as a Dataset."
        )
    texts, pictures = apart(rows, name)
    whole = how.completion_only is False
    reader = ExampleReader(name, texts.column_names, how.chat, how.text_field, whole, images=True)
    numbers, examples = _examples(texts, reader, pictures.counts, how, places_of(processor))
    made = Dataset.from_dict(
        {key: [json.dumps(each[key]) for each in examples] for key in examples[0]}
    )
    images = pictures.data
    if numbers != list(range(len(images))):
        images = images.select(numbers)
    data = datasets.concatenate_datasets([made, images], axis=1)
    data = data.with_transform(Decoded(pictures.single))
    lines = reader.lines(len(texts))
    if lines:
        logger.warning("%s: %s.", name, "; ".join(lines))
    lengths = [len(json.dumps(each)) for each in examples]
    return _tried(data, numbers, tried(lengths, pictures.counts, numbers), processor, name, whole)


def _examples(
    texts: Dataset, reader: ExampleReader, counts: list[int], how: Any, places: tuple[str, ...]
) -> tuple[list[int], list[Row]]:
    """The rows' numbers and examples."""
    if reader.shape.required == (how.text_field,):
        raise UserError(
            f"the {reader.name} dataset has images beside plain texts: expected messages, or "
            "prompt and completion."
        )
    numbers: list[int] = []
    examples: list[Row] = []
    for number, row in enumerate(plain_rows(texts)):
        made = [_finished(one, counts[number], how, reader, number) for one in reader(row, number)]
        turns = made[-1].get("prompt", made[-1].get("messages")) if made else ""
        if isinstance(turns, list) and placeholders(turns) != counts[number]:
            there = placeholders(turns)
            reader.refuse(number, f"{counts[number]} images, and {there} places for them")
        for one in made:
            _check_places(one, counts[number], places, reader, number)
        numbers += [number] * len(made)
        examples += made
    if not examples:
        raise UserError(f"no row of the {reader.name} dataset leaves something to train on.")
    if len({tuple(each) for each in examples}) > 1:
        reader.refuse(0, "another form than others: expected all of them in one")
    return numbers, examples


def places_of(processor: Any) -> tuple[str, ...]:
    """The tokens that may stand for an image in a text."""
    found = (getattr(processor, name, None) for name in PLACES)
    return tuple(dict.fromkeys(str(token) for token in found if token))


def _check_places(
    example: Row, count: int, places: tuple[str, ...], reader: ExampleReader, number: int
) -> None:
    """Refuse a token for an image where no image is meant, or none where one is."""
    if not places:
        return
    plain = isinstance(example.get("prompt"), str)
    if plain and not any(example["prompt"].count(token) == count for token in places):
        there = max(example["prompt"].count(token) for token in places)
        reader.refuse(number, f"{count} images, and {there} times {places[0]} in its prompt")
    texts = [example["completion"]] if plain else texts_of(example)
    wrong = next((token for token in places for text in texts if token in text), None)
    if wrong is not None:
        reader.refuse(
            number,
            f"{wrong} in a text, which stands for an image: expected a part "
            '{"type": "image"} for it, or nothing, which puts images first',
        )


def _finished(example: Row, count: int, how: Any, reader: ExampleReader, number: int) -> Row:
    """An example with places for its images; the completion of a text ends in the end token."""
    if example.get("tools") or example.get("chat_template_kwargs"):
        reader.refuse(number, "tools or chat_template_kwargs, which rows with images cannot have")
    if "messages" in example:
        return {"messages": with_placeholders(example["messages"], count)}
    prompt, completion = example["prompt"], example["completion"]
    if isinstance(prompt, str):
        end = how.tokenizer.eos_token
        return {"prompt": prompt, "completion": completion.removesuffix(end) + end}
    if placeholders(completion):
        reader.refuse(number, "an image in an answer, which a model of text cannot be trained on")
    return {
        "prompt": with_placeholders(prompt, count),
        "completion": with_placeholders(completion, 0),
    }


def tried(lengths: list[int], counts: list[int], numbers: list[int]) -> list[int]:
    """Which examples are put through the processor.

    Args:
        lengths: of each example's text.
        counts: images of each row.
        numbers: the row of each example.
    """
    every = range(len(lengths))
    if len(lengths) <= TRIED:
        return list(every)
    spread = [int(len(lengths) * (n * GOLDEN % 1)) for n in range(TRIED // 2)]
    longest = sorted(every, key=lambda at: -lengths[at])[: TRIED // 4]
    fullest = sorted(every, key=lambda at: (-counts[numbers[at]], -lengths[at]))[: TRIED // 4]
    return sorted({*spread, *longest, *fullest})


def _tried(
    data: Dataset, numbers: list[int], which: list[int], processor: Any, name: str, whole: bool
) -> ImageRows:
    """Some of the examples, put through the processor as TRL will put them.

    Raises:
        UserError: one cannot be, or none of them trains anything.
    """
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=not whole)
    lengths, trained, fullest = [], 0, dict[str, Any]()
    for at in which:
        try:
            batch = collate([data[at]])
        except UserError as error:
            raise UserError(f"row {numbers[at]} of the {name} dataset: {error}") from error
        except Exception as error:  # a template or an image may be anything
            if not whole and not _takes_text_alone(processor):
                raise UserError(
                    f"the model's {type(processor).__name__} takes no text without an image, and "
                    "TRL gives it answers alone: this model is trained on rows of text only."
                ) from error
            raise UserError(
                f"row {numbers[at]} of the {name} dataset cannot be put through the model's "
                f"{type(processor).__name__}: {first_line(error)}"
            ) from error
        lengths.append(int(batch["input_ids"].shape[1]))
        trained += int((batch["labels"][:, 1:] != IGNORED).sum())
        fullest = max(fullest, dict(batch), key=nbytes_of)
    if not trained:
        raise UserError(f"none of the {name} rows that were tried has a token to train on.")
    return ImageRows(data, max(lengths), len(lengths), fullest)


def nbytes_of(batch: dict[str, Any]) -> int:
    """Of the tensors of a batch."""
    return sum(held.nbytes for held in batch.values() if isinstance(held, Tensor))


def _takes_text_alone(processor: Any) -> bool:
    """Whether a processor takes a text without images, as TRL gives it an answer."""
    try:
        processor(text=["a"])
    except Exception:  # whatever it is, it does not
        return False
    return True
