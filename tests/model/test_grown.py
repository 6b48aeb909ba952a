"""An embedding with more rows than the base's: the same rows live, saved, merged and loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import load, make_checkpoint, make_tokenizer
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig, PhiForCausalLM

from leanlift import (
    LiftConfig,
    LiftTrainer,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.adapter import open_adapter
from leanlift.cli import main
from leanlift.cli.info import describe, format_info
from leanlift.export.rows import put_vocabulary, with_new_rows
from leanlift.grown import MOST_ADDED, Grown, new_rows
from leanlift.model import embedding_to_cpu, lift_layers, lift_state, restore_adapter
from leanlift.quantized import dtype_of
from leanlift.source import SourceTensor, open_checkpoint, plain_view
from leanlift.tiles import CastTiles, DenseTiles
from leanlift.training import LiftSFTConfig, RunArguments, plan_of, run
from leanlift.training.verify import verify_merged

HAVE = len(make_tokenizer())
TOKENS = ["<|im_start|>", "<|im_end|>", "<x>"]
ROWS = HAVE + len(TOKENS)
LIFT = LiftConfig(approx_rank=4, refresh_interval=0)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<x>{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant<x>{% endif %}"
)
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"say {i}"},
            {"role": "assistant", "content": str(i)},
        ]
    }
    for i in range(8)
]


def make_tokens() -> Any:
    """The base's tokenizer with more tokens, one of which ends a text."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    tokenizer.eos_token, tokenizer.chat_template = "<|im_end|>", TEMPLATE
    return tokenizer


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("grown") / "template"
    make_tokens().save_pretrained(path)
    return path


def make_biased(path: Path) -> Path:
    """A model whose untied head has a bias."""
    config = PhiConfig(
        vocab_size=HAVE,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=False,
        eos_token_id=1,
        bos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = PhiForCausalLM(config)
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def grown(stock: Any, lift: LiftConfig = LIFT, rows: int = ROWS, seed: int = 1) -> Any:
    """Attached to, with random offsets."""
    model = get_lift_model(stock, lift, progress=False, embedding_rows=rows)
    torch.manual_seed(seed)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.05)
    return model.eval()


@torch.no_grad()
def logits(model: Any, rows: int = ROWS) -> torch.Tensor:
    return model(torch.arange(rows - 40, rows).reshape(2, 20)).logits.float()


def edit(adapter: Path, **changes: Any) -> Path:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return adapter


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


# --- live, saved, merged, loaded -----------------------------------------------------------

ENDS = {
    "tied": {"tied": True},
    "untied": {"tied": False},
    "biased": None,
}


def make_any(path: Path, ends: str, dtype: torch.dtype = torch.float32) -> Path:
    options = ENDS[ends]
    return make_biased(path) if options is None else make_checkpoint(path, **options, dtype=dtype)


@pytest.mark.parametrize("quantized", [False, True], ids=["plain-ends", "int8-ends"])
@pytest.mark.parametrize("kind", ["nf4+double", "int8", "dense"])
@pytest.mark.parametrize("ends", ENDS)
def test_a_reloaded_and_a_merged_model_are_the_trained_one(
    tmp_path: Path, ends: str, kind: str, quantized: bool
) -> None:
    path = make_any(tmp_path / "base", ends)
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_ends=quantized)
    model = grown(load(path, kind), lift)
    expected = logits(model)
    assert expected.shape[-1] == ROWS == model.config.vocab_size
    assert lift_state(model).embedding_rows == ROWS
    save_adapter(model, tmp_path / "adapter")
    make_tokens().save_pretrained(tmp_path / "adapter")
    again = load_adapter(load(path, kind), tmp_path / "adapter").eval()
    assert torch.equal(logits(again), expected)
    assert lift_state(again).embedding_rows == again.config.vocab_size == ROWS

    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert stock.config.vocab_size == ROWS >= len(tokenizer)
    torch.testing.assert_close(logits(stock), expected, atol=2e-5, rtol=1e-5)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in tensors) == (ends != "tied")
    assert report.tensors == len(tensors)
    if not quantized:
        embedding = model.get_input_embeddings().weight
        assert torch.equal(embedding, stock.get_input_embeddings().weight)
        assert torch.equal(model.get_output_embeddings().weight, stock.lm_head.weight)
        assert (model.get_output_embeddings().weight is embedding) == (ends == "tied")
    rendered = tokenizer.apply_chat_template(CHATS[0]["messages"], return_dict=False)
    assert HAVE <= max(rendered) < ROWS


@pytest.mark.parametrize("loaded", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float16"])
def test_dtypes_of_file_and_model_may_differ(tmp_path: Path, stored: str, loaded: str) -> None:
    path = make_any(tmp_path / "base", "untied", dtype_of(stored))
    model = grown(load(path, "dense", dtype_of(loaded)))
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    original = load_file(path / "model.safetensors")
    ends = {"model.embed_tokens": model.get_input_embeddings(), "lm_head": model.lm_head}
    for name, module in ends.items():
        merged = tensors[f"{name}.weight"]
        assert torch.equal(merged[HAVE:], module.weight[HAVE:].float())
        assert torch.equal(merged[:HAVE], original[f"{name}.weight"].float())


def test_rows_of_a_merge_are_read_from_anywhere(tmp_path: Path) -> None:
    save_adapter(grown(load(make_biased(tmp_path / "base"), "dense")), tmp_path / "adapter")
    with open_adapter(tmp_path / "adapter") as adapter, open_checkpoint(tmp_path / "base") as files:
        tensors = with_new_rows(adapter, plain_view(files))
        for name in ("model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"):
            tensor = tensors[name]
            assert isinstance(tensor, SourceTensor)
            whole = tensor.whole()
            assert whole.shape == tensor.shape
            assert torch.equal(whole[:HAVE], files[name].whole())
            places = (0, 1, HAVE - 1, HAVE, HAVE + 1, ROWS)
            for start, stop in [(a, b) for a in places for b in places if a < b]:
                assert torch.equal(tensor.rows(start, stop), whole[start:stop])


def test_shards_and_a_head_that_is_stored_though_it_is_tied(base: Path, tmp_path: Path) -> None:
    path = shutil.copytree(base, tmp_path / "base")
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    model = grown(load(path, "dense"))
    save_adapter(model, tmp_path / "adapter")
    options: dict[str, Any] = {"dtype": "float32", "max_shard_size": 20_000, "progress": False}
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", **options)
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(logits(stock), logits(model), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("onto", ["original", "quantized"])
def test_a_merge_is_verified(base: Path, tmp_path: Path, onto: str) -> None:
    save_adapter(grown(load(base, "nf4+double")), tmp_path / "adapter")
    make_tokens().save_pretrained(tmp_path / "adapter")
    report = merge_adapter(tmp_path / "adapter", tmp_path / "merged", onto=onto, progress=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    found = verify_merged(tmp_path / "adapter", report, str(tmp_path / "rows.jsonl"))
    assert found.effect > found.bound / 10


def test_an_embedding_on_the_cpu(tmp_path: Path) -> None:
    path = make_any(tmp_path / "base", "untied")
    model = grown(load(path, "nf4"))
    expected = logits(model)
    embedding_to_cpu(model)
    assert torch.equal(logits(model), expected)
    save_adapter(model, tmp_path / "adapter")
    restore_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), expected)


def test_config_of_a_model_of_several_parts_says_it_everywhere() -> None:
    for config, wanted in (
        ({"vocab_size": 9}, {"vocab_size": 12}),
        ({}, {"vocab_size": 12}),
        ({"text_config": {}}, {"text_config": {"vocab_size": 12}}),
        (
            {"vocab_size": 9, "text_config": {"vocab_size": 9}, "vision_config": {}},
            {"vocab_size": 12, "text_config": {"vocab_size": 12}, "vision_config": {}},
        ),
    ):
        put_vocabulary(12, config)
        assert config == wanted


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


# --- adapters that lie ---------------------------------------------------------------------

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
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_ends=quantized)
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
    lift = LiftConfig(approx_rank=4, refresh_interval=0, quantize_ends=held == "int8")
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


# --- training ------------------------------------------------------------------------------


def settings(output: Path, **changes: Any) -> LiftSFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "use_cpu": True,
        "bf16": False,
        "max_steps": 4,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return LiftSFTConfig(**{**defaults, **changes})


def test_a_run_with_a_templates_tokens(
    base: Path,
    template: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    args = RunArguments(str(base), str(data), approx_rank=4, refresh_interval=3)

    def train(output: Path, resume: str | None = None, merged: Path | None = None) -> Any:
        args.merged_dir = None if merged is None else str(merged)
        args.merge_onto = "quantized"
        sft = settings(output, chat_template_path=str(template), resume_from_checkpoint=resume)
        return run(args, sft).model.eval()

    model = train(tmp_path / "whole", merged=tmp_path / "merged")
    said = [line for line in caplog.messages if "get rows there" in line]
    assert len(said) == 1
    assert "brings 3 tokens" in said[0]
    assert ", ".join(TOKENS) in said[0]
    assert model.config.eos_token_id == HAVE + TOKENS.index("<|im_end|>")

    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == ROWS == stock.get_input_embeddings().weight.shape[0]
    assert stock.config.eos_token_id == tokenizer.eos_token_id == model.config.eos_token_id
    difference = (logits(stock.eval()) - logits(model)).abs().max()
    assert difference <= 2e-3 * logits(model).abs().max()  # fp16

    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    resumed = train(tmp_path / "cut", "true")
    assert torch.equal(logits(resumed), logits(model))
    for name, layer in lift_layers(resumed).items():
        assert torch.equal(layer.values, lift_layers(model)[name].values)

    capsys.readouterr()
    options = ["--adapter", str(tmp_path / "whole"), "--data", str(data), "--max_new_tokens", "3"]
    assert main(["eval", *options, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 2 * len(CHATS)


def test_a_trainer_asks_for_the_rows_that_a_tokenizer_needs(
    base: Path, template: Path, tmp_path: Path
) -> None:
    def build(model: Any, tokenizer: Any, rows: Any = CHATS, **changes: Any) -> LiftTrainer:
        sft = settings(tmp_path / "run", **changes)
        return LiftTrainer(model=model, args=sft, train_dataset=rows, processing_class=tokenizer)

    small = get_lift_model(load(base, "dense"), LIFT, progress=False)
    padded = make_tokenizer()
    padded.add_special_tokens({"pad_token": "<more>"})
    used = make_tokens()
    used.eos_token = "</s>"
    for tokenizer, needed, changes in (
        (make_tokenizer(), ROWS, {"chat_template_path": str(template)}),
        (make_tokens(), HAVE + 2, {}),  # up to its end token
        (padded, HAVE + 1, {"rows": [{"text": "abc"}]}),
        (used, ROWS, {}),
    ):
        with pytest.raises(UserError, match=rf"embedding_rows={needed}\)"):
            build(small, tokenizer, **changes)
    assert small.get_input_embeddings().weight.shape[0] == HAVE

    model = get_lift_model(load(base, "dense"), LIFT, progress=False, embedding_rows=ROWS)
    build(model, make_tokenizer(), chat_template_path=str(template), save_strategy="no").train()
    assert model.config.vocab_size == ROWS


def test_a_plan_says_that_it_does_not_count_the_rows(
    base: Path, template: Path, tmp_path: Path
) -> None:
    args = RunArguments(str(base), "rows.jsonl", approx_rank=4)
    for path, told in ((template, True), (template / "chat_template.jinja", False), (None, False)):
        sft = settings(tmp_path / "run", chat_template_path=path and str(path))
        notes = " ".join(plan_of(args, sft, cuda=False).notes)
        assert ("chat_template_path" in notes) == told
