"""Adapters with new rows: those that lie, switching, combining, other forms."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from grown import (
    HAVE,
    LIFT,
    ROWS,
    edit,
    grown,
    logits,
    make_any,
)
from tiny import load, make_checkpoint

from leanlift import (
    LiftConfig,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.adapters import open_adapter
from leanlift.cli.info import describe, format_info
from leanlift.model import embedding_to_cpu, restore_adapter
from leanlift.weights.grown import MOST_ADDED, Grown

LIES: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"embedding_rows": 0}, "embedding_rows as a number"),
    "negative": ({"embedding_rows": -ROWS}, "embedding_rows as a number"),
    "true": ({"embedding_rows": True}, "embedding_rows as a number"),
    "text": ({"embedding_rows": str(ROWS)}, "embedding_rows as a number"),
    "fraction": ({"embedding_rows": ROWS + 0.5}, "embedding_rows as a number"),
    "whole-float": ({"embedding_rows": float(ROWS)}, "embedding_rows as a number"),
    "list": ({"embedding_rows": [ROWS]}, "embedding_rows as a number"),
    "null": ({"embedding_rows": None}, "embedding_rows as a number"),
    "huge": ({"embedding_rows": 2**31}, "embedding_rows as a number"),
    "large": ({"embedding_rows": 2**31 - 1}, "expected at most"),
    "too-many": ({"embedding_rows": HAVE + MOST_ADDED + 1}, "expected at most"),
    "base": ({"embedding_rows": HAVE}, "has grown to"),
    "fewer": ({"embedding_rows": HAVE - 1}, "has grown to"),
    "no-head": ({"output_head": None}, "output_head as the name"),
    "head-climbs": ({"output_head": "../lm_head"}, "output_head as the name"),
    "head-a-number": ({"output_head": 3}, "output_head as the name"),
    "head-elsewhere": ({"output_head": "model.norm"}, "the output head is"),
    "head-a-target": ({"output_head": "model.layers.0.mlp.up_proj"}, "the output head is"),
}


@pytest.fixture(scope="module")
def honest(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A grown adapter, a stock base and one that is attached to; none to be changed."""
    path = tmp_path_factory.mktemp("honest") / "adapter"
    save_adapter(grown(load(base, "dense")), path)
    attached = get_lift_model(load(base, "dense"), LIFT, progress=False)
    return path, load(base, "dense").eval(), attached.eval()


@pytest.mark.parametrize("lie", LIES)
def test_a_damaged_number_of_rows_is_refused(
    honest: tuple[Path, Any, Any], base: Path, tmp_path: Path, lie: str
) -> None:
    path, *models = honest
    changes, words = LIES[lie]
    adapter = edit(shutil.copytree(path, tmp_path / "adapter"), **changes)
    for model in models:
        before = logits(model, HAVE)
        with pytest.raises(UserError, match=words):
            load_adapter(model, adapter)
        assert torch.equal(logits(model, HAVE), before)
        assert model.config.vocab_size == HAVE
    if lie != "head-elsewhere":  # a merge knows no modules, but sees that shapes do not fit
        words = words if "head is" not in words else "does not say which|cannot get rows"
    else:
        words = "cannot get rows"
    with pytest.raises(UserError, match=words):
        merge_adapter(adapter, tmp_path / "merged", base=base, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("head", ["model.head", "model.layers.0.mlp.up_proj"])
@pytest.mark.parametrize("quantized", [False, True], ids=["plain-ends", "int8-ends"])
def test_a_merge_does_not_take_another_matrix_for_the_head(
    tmp_path: Path, quantized: bool, head: str
) -> None:
    base = make_checkpoint(tmp_path / "base", tied=False, intermediate=HAVE)
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_embeddings=quantized)
    save_adapter(grown(load(base, "dense"), lift), tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "fine", progress=False)
    edit(tmp_path / "adapter", output_head=head)
    with pytest.raises(UserError, match=r"output head is model\.head|which embedding has grown"):
        merge_adapter(tmp_path / "adapter", tmp_path / "merged", progress=False)
    assert not (tmp_path / "merged").exists()


def test_without_the_field_an_adapter_has_the_rows_of_its_base(
    honest: tuple[Path, Any, Any], base: Path, tmp_path: Path
) -> None:
    adapter = shutil.copytree(honest[0], tmp_path / "adapter")
    edit(adapter, embedding_rows=None, output_head=None)
    assert load_adapter(load(base, "dense"), adapter).config.vocab_size == HAVE


def test_an_older_reader_is_told(honest: tuple[Path, Any, Any]) -> None:
    data = json.loads((honest[0] / "adapter_config.json").read_text())
    assert (data["format_version"], data["embedding_rows"]) == (3, ROWS)
    assert data["output_head"] == "lm_head"


# --- switching, combining, other forms -----------------------------------------------------


def test_switching_grows_or_refuses(base: Path, tmp_path: Path) -> None:
    plain, more, most = (tmp_path / name for name in ("plain", "more", "most"))
    save_adapter(get_lift_model(load(base, "dense"), LIFT, progress=False), plain)
    save_adapter(grown(load(base, "dense")), more)
    save_adapter(grown(load(base, "dense"), rows=ROWS + 1), most)

    model = get_lift_model(load(base, "dense"), LIFT, progress=False).eval()
    load_adapter(model, more)
    expected = logits(grown(load(base, "dense")))
    assert torch.equal(logits(model), expected)
    for adapter, words in ((plain, "the base's rows"), (most, f"{ROWS + 1} rows")):
        for put in (load_adapter, restore_adapter):
            with pytest.raises(UserError, match=f"with {words} in the embedding, but .* {ROWS}"):
                put(model, adapter)
            assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path / "again")
    with open_adapter(tmp_path / "again") as opened:
        assert opened.grown == Grown(ROWS, "lm_head")

    fresh = get_lift_model(load(base, "dense"), LIFT, progress=False)
    with pytest.raises(UserError, match=f"with {ROWS} rows in the embedding, but"):
        restore_adapter(fresh, more)


@pytest.mark.parametrize("held", ["int8", "cpu"])
def test_replaced_ends_do_not_grow(tmp_path: Path, held: str) -> None:
    path = make_any(tmp_path / "base", "untied")
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_embeddings=held == "int8")
    save_adapter(grown(load(path, "dense"), lift), tmp_path / "adapter")
    model = get_lift_model(load(path, "dense"), lift, progress=False).eval()
    if held == "cpu":
        embedding_to_cpu(model)
    before = logits(model, HAVE)
    with pytest.raises(UserError, match=r"cannot get rows.*load the base again"):
        load_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model, HAVE), before)


def test_adapters_of_one_number_of_rows_combine(base: Path, tmp_path: Path) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    save_adapter(grown(load(base, "dense")), one)
    save_adapter(grown(load(base, "dense"), seed=2), two)
    save_adapter(get_lift_model(load(base, "dense"), LIFT, progress=False), other)
    combine_adapters([one, two], tmp_path / "sum", progress=False)
    assert load_adapter(load(base, "dense"), tmp_path / "sum").config.vocab_size == ROWS
    for pair in ([one, other], [other, one]):
        with pytest.raises(UserError, match="numbers of rows in the embedding"):
            combine_adapters(pair, tmp_path / "no", progress=False)


def test_other_forms(base: Path, tmp_path: Path) -> None:
    save_adapter(grown(load(base, "dense")), tmp_path / "adapter")
    with pytest.raises(UserError, match=f"embedding of {ROWS} rows.*merge it instead"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    assert not (tmp_path / "peft").exists()
    data = describe(tmp_path / "adapter")
    assert data["embedding_rows"] == ROWS
    assert f"has grown to {ROWS} rows" in format_info(data)

    save_adapter(get_lift_model(load(base, "dense"), LIFT, progress=False), tmp_path / "plain")
    export_peft(tmp_path / "plain", tmp_path / "peft", progress=False)
    facts = tmp_path / "peft" / "leanlift.json"
    lie = {"embedding_rows": ROWS, "output_head": "lm_head"}
    facts.write_text(json.dumps({**json.loads(facts.read_text()), **lie}))
    with pytest.raises(UserError, match="no place for embedding_rows"):
        load_adapter(load(base, "dense"), tmp_path / "peft")
    assert describe(tmp_path / "plain")["embedding_rows"] is None
