"""An embedding with more rows than the base's: the same rows live, saved, merged and loaded."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import (
    HAVE,
    LIFT,
    ROWS,
    logits,
    make_any,
)
from tiny import load
from torch import nn

from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    save_adapter,
)
from leanlift.model import lift_layers, lift_state
from leanlift.tiles import CastTiles, DenseTiles
from leanlift.weights.grown import MOST_ADDED, new_rows

# --- the rows ------------------------------------------------------------------------------


def some_weight(m: int, n: int) -> torch.Tensor:
    """Numbers that are exact in every dtype."""
    return ((torch.arange(m * n) * 7919 % 251 - 125) / 64).reshape(m, n)


@pytest.mark.parametrize("m", [1, 2, 255, 256, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_the_mean_and_a_signed_sum_of_sixteen(m: int, dtype: torch.dtype) -> None:
    weight = some_weight(m, 5).to(dtype)
    found = new_rows(DenseTiles(weight), m + 4, dtype)
    mean, wanted = weight.double().mean(0), []
    for number in range(m, m + 4):
        digest = hashlib.sha512(str(number).encode()).digest()
        words = [int.from_bytes(digest[at : at + 4], "little") for at in range(0, 64, 4)]
        signed = sum((-1) ** i * weight[word * m // 2**32].double() for i, word in enumerate(words))
        wanted.append(mean + signed / 4)
    assert found.dtype == dtype
    torch.testing.assert_close(found, torch.stack(wanted).to(dtype))
    assert torch.equal(found[:2], new_rows(DenseTiles(weight), m + 2, dtype))
    assert torch.equal(found, new_rows(CastTiles(DenseTiles(weight.float()), dtype), m + 4, dtype))


def test_rows_are_rounded_once() -> None:
    """So they are the same on every machine: sums in fp64 err far less than fp32 resolves."""
    weight = some_weight(777, 3) / 3 + 1000  # the mean counts most
    exact = [[Fraction(value) for value in row] for row in weight.tolist()]
    found = new_rows(DenseTiles(weight), 780, torch.float32)
    for number, row in enumerate(found.tolist(), 777):
        words = struct.unpack("<16I", hashlib.sha512(str(number).encode()).digest())
        for column, value in enumerate(row):
            mean = sum(line[column] for line in exact) / 777
            signed = sum((-1) ** i * exact[w * 777 >> 32][column] for i, w in enumerate(words))
            assert value == torch.tensor(float(mean + signed / 4)).item()


def test_every_new_token_can_be_the_likeliest_and_is_unlike_the_others() -> None:
    weight = torch.randn(500, 64, generator=torch.Generator().manual_seed(0))
    rows = new_rows(DenseTiles(weight), 520, torch.float32)
    whole = torch.cat([weight, rows])
    assert (whole @ (rows - weight.mean(0)).T).argmax(0).tolist() == list(range(500, 520))
    likeness = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=-1)
    assert (likeness - torch.eye(20)).abs().max() < 0.6
    assert 0.8 < rows.std() / weight.std() < 1.2


# --- where nothing grows -------------------------------------------------------------------


@pytest.mark.parametrize("rows", [None, 1, HAVE - 2, HAVE])
def test_an_embedding_with_enough_rows_stays(base: Path, tmp_path: Path, rows: int | None) -> None:
    model = get_lift_model(load(base, "dense"), LIFT, progress=False, embedding_rows=rows)
    assert model.config.vocab_size == HAVE == model.get_input_embeddings().weight.shape[0]
    assert lift_state(model).embedding_rows is None
    save_adapter(model, tmp_path / "adapter")
    data = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert data["format_version"] == 2
    assert not {"embedding_rows", "output_head"} & data.keys()


@pytest.mark.parametrize("rows", [0, -1, True, 101.0, "101", HAVE + MOST_ADDED + 1])
def test_no_number_of_rows(base: Path, rows: Any) -> None:
    stock = load(base, "dense").eval()
    before = logits(stock, HAVE)
    with pytest.raises(UserError, match="embedding_rows"):
        get_lift_model(stock, LIFT, progress=False, embedding_rows=rows)
    assert torch.equal(logits(stock, HAVE), before)
    assert not lift_layers(stock)


def another_embedding(model: Any) -> None:
    model.model.per_layer = nn.Embedding(HAVE, 8)


def another_head(model: Any) -> None:
    model.model.extra = nn.Linear(64, HAVE, bias=False)
    model.model.extra.weight = model.lm_head.weight


def larger_head(model: Any) -> None:
    model.lm_head = nn.Linear(64, HAVE + 5, bias=False)


@pytest.mark.parametrize("change", [another_embedding, another_head, larger_head])
def test_ends_that_cannot_grow(base: Path, change: Callable[[Any], None]) -> None:
    stock = load(base, "dense").eval()
    change(stock)
    before = logits(stock, HAVE)
    with pytest.raises(UserError, match="cannot get rows for more tokens"):
        get_lift_model(stock, LIFT, progress=False, embedding_rows=ROWS)
    assert torch.equal(logits(stock, HAVE), before)
    assert stock.config.vocab_size == HAVE


def test_gradient_masks_see_the_tokens_and_leave_a_refused_model_as_it_was(tmp_path: Path) -> None:
    path = make_any(tmp_path / "base", "biased")
    ids = torch.arange(ROWS - 12, ROWS)[None]
    batch = {"input_ids": ids, "labels": ids}
    lift = LiftConfig(selector="gradient", refresh_interval=0)
    model = get_lift_model(
        load(path, "dense"), lift, progress=False, calibration=[batch], embedding_rows=ROWS
    )
    assert model.config.vocab_size == ROWS
    stock = load(path, "dense").eval()
    before, outside = logits(stock, HAVE), {"input_ids": ids + 9, "labels": ids}
    with pytest.raises(IndexError):
        get_lift_model(stock, lift, progress=False, calibration=[outside], embedding_rows=ROWS)
    assert torch.equal(logits(stock, HAVE), before)
    ends = stock.get_input_embeddings().num_embeddings, stock.lm_head.out_features
    assert (*ends, stock.config.vocab_size, stock.vocab_size) == (HAVE,) * 4
    assert all(parameter.requires_grad for parameter in stock.parameters())
