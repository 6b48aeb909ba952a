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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Image, IterableDataset, List
from transformers import AutoProcessor, ProcessorMixin
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from leanlift.data.tokens import IGNORED
from leanlift.errors import UserError, first_line
from leanlift.rows.examples import ExampleReader
from leanlift.rows.images import image_column, placeholders, with_placeholders
from leanlift.rows.source import Row, as_dataset, plain_rows

logger = logging.getLogger("leanlift")

IMAGES = "images"

TRIED = 16
"""Rows that are put through the processor beforehand, spread evenly over all of them."""


@dataclass(frozen=True)
class ImageRows:
    """Examples with images, for TRL's collator.

    Attributes:
        data: of prompt and completion, or messages, and images.
        longest: tokens of the longest example that was tried.
        tried: how many were.
    """

    data: Dataset
    longest: int
    tried: int


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
        raise UserError(
            f"the processor of {source}, which its rows with images need, cannot be loaded: "
            f"{first_line(error)}"
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
                found if isinstance(turns, str) else found[: placeholders(turns)]
                for found, turns in zip(lists, before, strict=True)
            ]
        return made

    def _listed(self, found: Any) -> list[Any]:
        if found is None:
            return []
        return [found] if self.single else list(found)


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
    texts, pictures = _apart(rows, name)
    whole = how.completion_only is False
    reader = ExampleReader(name, texts.column_names, how.chat, how.text_field, whole, images=True)
    numbers, examples = _examples(texts, reader, pictures.counts, how)
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
    return _tried(data, numbers, processor, name, whole)


def _examples(
    texts: Dataset, reader: ExampleReader, counts: list[int], how: Any
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
            places = placeholders(turns)
            reader.refuse(number, f"{counts[number]} images, and {places} places for them")
        numbers += [number] * len(made)
        examples += made
    if not examples:
        raise UserError(f"no row of the {reader.name} dataset leaves something to train on.")
    if len({tuple(each) for each in examples}) > 1:
        reader.refuse(0, "another form than others: expected all of them in one")
    return numbers, examples


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


@dataclass(frozen=True)
class _Pictures:
    """The images of rows: a dataset of one column, whether each is one image or a list of them, and
    how many each row has."""

    data: Dataset
    single: bool
    counts: list[int]


def _apart(rows: Any, name: str) -> tuple[Dataset, _Pictures]:
    """Rows without their images, and these."""
    if isinstance(rows, (list, tuple)):
        column = image_column({key for row in rows for key in row}) or IMAGES
        texts = as_dataset({k: v for k, v in row.items() if k != column} for row in rows)
        return texts, _encoded([row.get(column) for row in rows], name)
    column = image_column(rows.column_names) or IMAGES
    texts, feature = rows.remove_columns(column), rows.features[column]
    inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
    if not _holds_images(feature) and not _holds_images(inner):
        return texts, _encoded(list(rows[column]), name)
    alone = rows.with_format(None).select_columns(column).rename_columns({column: IMAGES})
    kind = Image() if _holds_images(feature) else List(Image())
    return texts, _counted(alone.cast_column(IMAGES, kind), name)


def _holds_images(feature: Any) -> bool:
    """Whether a column is of images, or of what `datasets` stores them as."""
    return isinstance(feature, Image) or (
        isinstance(feature, dict) and {"bytes", "path"} == set(feature)
    )


def _encoded(values: list[Any], name: str) -> _Pictures:
    """Images that were given as paths or as they are."""
    lists = [[] if v is None else list(v) if isinstance(v, (list, tuple)) else [v] for v in values]
    try:
        made = Dataset.from_dict({IMAGES: lists}, features=Features({IMAGES: List(Image())}))
    except Exception as error:  # pyarrow and each kind of object fail in their own way
        raise UserError(
            f"the {name} dataset has something else than images in its column of images: expected "
            f"paths of files, or images ({first_line(error)})."
        ) from error
    return _counted(made, name)


def _counted(data: Dataset, name: str) -> _Pictures:
    """Counts, and looks for the files that are named."""
    single = isinstance(data.features[IMAGES], Image)
    counts: list[int] = []
    for chunk in data.with_format("arrow")[:].column(IMAGES).chunks:
        held = chunk if single else chunk.flatten()
        if single:
            counts += [int(there) for there in chunk.is_valid().to_pylist()]
        else:
            counts += [count or 0 for count in chunk.value_lengths().to_pylist()]
        without = held.filter(held.field("bytes").is_null())
        for path in without.field("path").to_pylist():
            if path is not None and not Path(path).is_file():
                raise UserError(
                    f"the {name} dataset names the image {path:.200}, which is no file on this "
                    "machine: expected a path from the directory of the rows' file, or a whole one."
                )
    return _Pictures(data, single, counts)


def _tried(data: Dataset, numbers: list[int], processor: Any, name: str, whole: bool) -> ImageRows:
    """Some of the examples, put through the processor as TRL will put them.

    Raises:
        UserError: one cannot be, or none of them trains anything.
    """
    collate = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=not whole)
    every = -(-len(data) // TRIED)
    lengths, trained = [], 0
    for at in range(0, len(data), every):
        try:
            batch = collate([data[at]])
        except Exception as error:  # a template or an image may be anything
            raise UserError(
                f"row {numbers[at]} of the {name} dataset cannot be put through the model's "
                f"{type(processor).__name__}: {first_line(error)}"
            ) from error
        lengths.append(int(batch["input_ids"].shape[1]))
        trained += int((batch["labels"][:, 1:] != IGNORED).sum())
    if not trained:
        raise UserError(f"none of the {name} rows that were tried has a token to train on.")
    return ImageRows(data, max(lengths), len(lengths))
