"""The images of rows before a run: which can be read, where they are, which rows are tried."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, Image, List, Value
from seeing import picture, rows_with_pictures

from leanlift import UserError
from leanlift.data.images import TRIED, check_image_settings, tried
from leanlift.data.pictures import IMAGES, NamingCollator, apart, opened
from leanlift.rows.images import texts_of
from leanlift.rows.source import load_rows

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")  # datasets leaves files open

KINDS = ("png", "jpeg", "bmp")


@pytest.mark.parametrize("kind", KINDS)
def test_files_that_are_cut_off_are_found_beforehand(kind: str, tmp_path: Path) -> None:
    whole = tmp_path / f"whole.{kind}"
    picture(0).save(whole)
    more = tmp_path / f"more.{kind}"
    more.write_bytes(whole.read_bytes() + b"\0" * 200)  # as some cameras leave it
    texts, found = apart([{"images": [str(whole), str(more)], "prompt": "a"}], "train")
    assert found.counts == [2]
    assert texts.column_names == ["prompt"]
    assert opened(found.data[0][IMAGES][0]).size == picture(0).size

    cut = tmp_path / f"cut.{kind}"
    for kept in (0.8, 0.0):
        cut.write_bytes(whole.read_bytes()[: int(kept * whole.stat().st_size)])
        if kind == "bmp" and kept:  # has no mark at its end: it shows when it is read
            stored = apart([{"image": str(cut)}], "train")[1].data[0][IMAGES][0]
            with pytest.raises(UserError, match=r"cut\.bmp cannot be read"):
                opened(stored)
            continue
        with pytest.raises(UserError, match=rf"eval dataset names the image .*cut\.{kind}, which"):
            apart([{"image": str(whole)}, {"image": str(cut)}], "eval")


def test_what_is_held_in_rows_and_is_no_image_says_so() -> None:
    with pytest.raises(UserError, match=r"held in the rows \(3 bytes\) cannot be read"):
        opened({"bytes": b"abc", "path": None})
    assert opened(None) is None


def test_a_batch_that_fails_names_its_files(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.png")

    def fails(examples: Any) -> Any:
        raise IndexError("list index out of range")

    rows = [{"prompt": "p", "images": [opened({"bytes": None, "path": str(tmp_path / "a.png")})]}]
    with pytest.raises(UserError, match=r"a\.png, cannot be put through.*list index"):
        NamingCollator(fails)(rows)
    with pytest.raises(UserError, match=r"begin with what is it"):
        NamingCollator(fails)([{"prompt": "what is it", "images": [picture(0)]}])
    assert NamingCollator(len)(rows) == 1


def stored(kind: str, rows: list[dict[str, Any]], directory: Path) -> Dataset:
    """Rows as Parquet has them, their images named in one of several ways."""
    names = [row["images"][0] for row in rows]
    texts = {"prompt": ["a"] * len(rows), "completion": ["b"] * len(rows)}
    values: Any = {
        "a path": names,
        "a list": [[name] for name in names],
        "a struct": [{"bytes": None, "path": name} for name in names],
        "an image": [{"bytes": (directory / name).read_bytes(), "path": name} for name in names],
    }[kind]
    text = Value("string")
    struct = {"bytes": Value("binary"), "path": text}
    form: Any = {"a path": text, "a list": List(text), "a struct": struct, "an image": Image()}
    features = Features({"image": form[kind], "prompt": text, "completion": text})
    return Dataset.from_dict({"image": values, **texts}, features=features)


@pytest.mark.parametrize("kind", ["a path", "a list", "a struct", "an image"])
def test_parquet_names_images_from_its_own_directory(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    directory = tmp_path / "rows"
    lines = rows_with_pictures(directory).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    stored(kind, rows, directory).to_parquet(directory / "rows.parquet")
    texts, found = apart(load_rows(str(directory / "rows.parquet")), "train")
    assert found.counts == [1] * 4
    assert set(texts.column_names) == {"prompt", "completion"}
    for number in range(4):
        held = found.data[number][IMAGES]
        assert opened(held if found.single else held[0]).tobytes() == picture(number).tobytes()


@pytest.mark.parametrize("turns", [1, 2, 3, 4, 5, 7])
def test_rows_that_are_tried_fall_in_with_no_turns(turns: int) -> None:
    count = turns * 100
    numbers = [at // turns for at in range(count)]
    lengths, images = [10 + at % turns for at in range(count)], [1] * 100
    lengths[33], images[5] = 1000, 3
    found = tried(lengths, images, numbers)
    assert len(found) <= TRIED
    assert {at % turns for at in found} == set(range(turns))
    assert 33 in found
    assert 5 in {numbers[at] for at in found}
    assert tried([1] * TRIED, [1] * TRIED, list(range(TRIED))) == list(range(TRIED))


def test_a_template_of_a_tokenizer_is_not_taken_beside_images() -> None:
    settings: dict[str, Any] = dict.fromkeys(
        ("packing", "padding_free", "assistant_only_loss", "pad_to_multiple_of", "dataset_kwargs")
    )
    check_image_settings(SimpleNamespace(**settings), None)
    with pytest.raises(UserError, match="the template of the processor"):
        check_image_settings(SimpleNamespace(**settings, chat_template_path="t.jinja"), None)


def test_the_texts_of_a_chat_are_found_in_either_form() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "a"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "b"}]
    assert sorted(texts_of({"prompt": turns[:1], "completion": turns[1:]})) == ["a", "b"]
    assert texts_of({"prompt": "a", "completion": "b"}) == []
