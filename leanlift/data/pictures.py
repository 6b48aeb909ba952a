"""The images of rows: where they are, how many each row has, and that each can be opened.

Images stay where they are, as paths or bytes, until a batch is made. A file that is no image, or
was cut off, would end a run in its middle, so every file that rows name is opened beforehand: its
head is read, and its end is looked at where its kind of file has a mark there.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List

from leanlift.errors import UserError, first_line
from leanlift.rows.images import image_column
from leanlift.rows.source import Row, as_dataset

IMAGES = "images"

LAST_BYTES = 64
ENDS = {"PNG": b"IEND", "JPEG": b"\xff\xd9"}
"""What stands among the last bytes of a whole file, by kind."""


@dataclass(frozen=True)
class Pictures:
    """The images of rows: a dataset of one column, whether each is one image or a list of them, and
    how many each row has."""

    data: Dataset
    single: bool
    counts: list[int]


def apart(rows: Any, name: str) -> tuple[Dataset, Pictures]:
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


def _encoded(values: list[Any], name: str) -> Pictures:
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


def _counted(data: Dataset, name: str) -> Pictures:
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
        for path in dict.fromkeys(without.field("path").to_pylist()):
            if path is not None:
                _check_file(path, name)
    stored = Image(decode=False)
    data = data.cast_column(IMAGES, stored if single else List(stored))
    return Pictures(data, single, counts)


def _check_file(path: str, name: str) -> None:
    """Refuse what is no file, or no image, or a part of one."""
    from PIL import Image as Pillow

    if not Path(path).is_file():
        raise UserError(
            f"the {name} dataset names the image {path:.200}, which is no file on this "
            "machine: expected a path from the directory of the rows' file, or a whole one."
        )
    try:
        with Pillow.open(path) as image, Path(path).open("rb") as file:
            end = ENDS.get(str(image.format))
            file.seek(-min(LAST_BYTES, os.path.getsize(path)), os.SEEK_END)
            if end is not None and end not in file.read():
                image.load()  # it may be whole, with more behind it
    except Exception as error:  # each kind of file has its own ways to be damaged
        raise UserError(
            f"the {name} dataset names the image {path:.200}, which cannot be read as one: "
            f"{first_line(error)}"
        ) from error


def opened(stored: Any) -> Any:
    """An image of a row, as Pillow has it.

    Args:
        stored: its bytes and path; None stays None.

    Raises:
        UserError: it cannot be read.
    """
    if stored is None:
        return None
    try:
        return Image().decode_example(stored)
    except Exception as error:  # as above
        where = stored.get("path") or f"held in the rows ({len(stored.get('bytes') or b'')} bytes)"
        raise UserError(
            f"the image {where:.200} cannot be read as one: {first_line(error)}"
        ) from error


def naming_collator(collate: Any, images: bool) -> Any:
    """A collator as it is; of rows with images, one whose failures say which rows they are
    about."""
    return NamingCollator(collate) if images else collate


class NamingCollator:
    """A collator over examples with images, whose failures say which they are.

    Args:
        collate: the one that makes the batch.
    """

    def __init__(self, collate: Any) -> None:
        self.collate = collate

    def __call__(self, examples: list[Row]) -> Any:
        """A batch.

        Raises:
            UserError: the processor, or a template, cannot have these rows.
        """
        try:
            return self.collate(examples)
        except UserError:
            raise
        except Exception as error:  # a template or an image may be anything
            images = [one for row in examples for one in row.get(IMAGES) or ()]
            files = [name for one in images if (name := getattr(one, "filename", ""))]
            first = next(iter(examples[0].values()), "") if examples else ""
            which = f"of {', '.join(files[:3])}" if files else f"that begin with {first!s:.120}"
            raise UserError(
                f"rows with images, {which}, cannot be put through the model's processor: "
                f"{first_line(error)}"
            ) from error
