"""Tokens whose rows of the embedding are trained, and of a head that is tied to it."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import config_of
from grown import CHATS, make_tokens
from helpers import bits
from runs import trainer_for
from sweeps import swept
from tiny import load, make_checkpoint, make_checkpoint_of
from transformers import AutoModelForCausalLM

from leanlift import (
    LiftConfig,
    PlanSettings,
    SparseAdamW,
    UserError,
    combine_adapters,
    export_peft,
    get_lift_model,
    load_adapter,
    merge_adapter,
    plan_memory,
    refresh_mask,
    save_adapter,
    scale_adapter,
    unload_adapter,
)
from leanlift.cli import main
from leanlift.evaluation.verify import verify_merged
from leanlift.layers import LiftEmbedding
from leanlift.measure.meter import static_categories
from leanlift.model import lift_layers
from leanlift.training import LiftSFTConfig, RunArguments
from leanlift.training.changes import changes

IDS = torch.arange(36).view(4, 9) % 90
IDS[:, 3], IDS[:, 7] = 5, 98
TOKENS = LiftConfig(density=0.1, approx_rank=8, trainable_token_indices=(98, 5))


@pytest.fixture(scope="module", params=swept([True, False], True), ids=["tied", "untied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", tied=request.param)


def train(model: Any, ids: torch.Tensor = IDS) -> None:
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    refresh_mask(model, optimizer)
    model.eval()


def changed(**changes: Any) -> LiftConfig:
    return LiftConfig(**{**TOKENS.to_dict(), **changes})


def test_gradients_are_those_of_the_rows(base: Path) -> None:
    model = get_lift_model(load(base, "dense"), TOKENS, progress=False)
    stock = load(base, "dense")
    stock.requires_grad_(False)
    stock.model.embed_tokens.weight.requires_grad_(True)
    for each in model, stock:
        each(IDS, labels=IDS).loss.backward()
    found = lift_layers(model)["model.embed_tokens"].values.grad
    wanted = stock.model.embed_tokens.weight.grad[[5, 98]]
    assert found is not None
    assert wanted.abs().max() > 1e-4
    torch.testing.assert_close(found.view(2, -1), wanted, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("kind", swept(["nf4+double", "dense"], "nf4+double"))
@pytest.mark.parametrize("ends", [False, True], ids=["plain", "int8"])
@pytest.mark.parametrize("rows", [None, 105], ids=["as it was", "grown"])
def test_trained_tokens_are_saved_loaded_and_merged(
    base: Path, tmp_path: Path, rows: int | None, ends: bool, kind: str
) -> None:
    ids = IDS if rows is None else IDS.clone().index_fill_(1, torch.tensor([2]), 104)
    config = changed(
        quantize_embeddings=ends, trainable_token_indices=(5, 98 if rows is None else 104)
    )
    model = get_lift_model(load(base, kind), config, progress=False, embedding_rows=rows)
    untrained = model.eval()(ids).logits
    train(model, ids)
    expected = model(ids).logits
    assert (expected - untrained).abs().max() > 0.05
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load(base, kind), tmp_path / "adapter").eval()
    assert torch.equal(bits(again(ids).logits), bits(expected))

    for onto in "quantized", "original":
        merge_adapter(
            tmp_path / "adapter", tmp_path / onto, dtype="float32", onto=onto, progress=False
        )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized").eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=2e-5, rtol=1e-5)
    rest = [i for i in range(99) if i not in config.trainable_token_indices]
    onto = AutoModelForCausalLM.from_pretrained(tmp_path / "original").model.embed_tokens.weight
    stock = load(base, "dense").model.embed_tokens.weight
    assert torch.equal(onto[rest], stock[rest])
    layer = lift_layers(model)["model.embed_tokens"]
    moved = (onto[5] - stock[5]).float()
    torch.testing.assert_close(moved, layer.values.view(2, -1)[0], atol=1e-6, rtol=1e-5)

    unload_adapter(model)
    assert not lift_layers(model)
    load_adapter(model, tmp_path / "adapter")
    assert torch.equal(bits(model.eval()(ids).logits), bits(expected))


def test_rows_are_scaled_with_the_adapter(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(load(base), TOKENS, progress=False)
    before = model.eval()(IDS).logits
    train(model)
    assert not torch.equal(model(IDS).logits, before)
    assert torch.equal(scale_adapter(model, 0.0)(IDS).logits, before)


def test_an_embedding_that_multiplies_its_rows(tmp_path: Path) -> None:
    place = make_checkpoint_of(config_of("gemma3"), tmp_path / "gemma3")
    model = get_lift_model(load(place), TOKENS, progress=False)
    layer = model.get_input_embeddings()
    assert isinstance(layer, LiftEmbedding)
    layer.values.data.normal_(0, 0.1)
    expected = model.eval()(IDS).logits
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=1e-5)
    ids = ", ".join(map(str, model.leanlift.config.trainable_token_indices))
    assert f"| trained tokens | {ids} |" in (tmp_path / "merged" / "README.md").read_text()


def test_a_run_trains_resumes_and_verifies(base: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    config = changed(refresh_interval=2)
    trainer = trainer_for(base, tmp_path / "run", config, **options)
    trainer.train()
    again = trainer_for(base, tmp_path / "run", config, **options)
    again.train(resume_from_checkpoint=True)
    for name, layer in lift_layers(trainer.model).items():
        assert torch.equal(lift_layers(again.model)[name].values, layer.values), name
    save_adapter(trainer.model, tmp_path / "adapter")
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a#b", "completion": "two"}\n')
    for onto in "original", "quantized":
        report = merge_adapter(
            tmp_path / "adapter", tmp_path / onto, dtype="float32", onto=onto, progress=False
        )
        assert verify_merged(tmp_path / "adapter", report, str(rows)).difference < 1e-4


def test_another_adapter_takes_the_place(base: Path, tmp_path: Path) -> None:
    outputs = {}
    for name, tokens in {"one": (5, 98), "two": (7,), "none": ()}.items():
        model = get_lift_model(load(base), changed(trainable_token_indices=tokens), progress=False)
        train(model)
        outputs[name] = model(IDS).logits
        save_adapter(model, tmp_path / name)
    for name in "one", "two", "none", "two":
        load_adapter(model, tmp_path / name)
        assert torch.equal(bits(model.eval()(IDS).logits), bits(outputs[name])), name
    combine_adapters([tmp_path / "one", tmp_path / "one"], tmp_path / "same", [0.5, 0.5])
    load_adapter(model, tmp_path / "same")
    torch.testing.assert_close(model.eval()(IDS).logits, outputs["one"], atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="have trained other tokens"):
        combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "no")
    with pytest.raises(UserError, match="rows of the embedding, which PEFT's SHiRA has no place"):
        export_peft(tmp_path / "one", tmp_path / "peft", progress=False)


@pytest.mark.parametrize("ends", swept([False, True], True), ids=["plain", "int8"])
def test_a_plan_counts_trained_tokens(base: Path, ends: bool) -> None:
    config = changed(quantize_embeddings=ends)
    real = static_categories(get_lift_model(load(base), config, progress=False))
    settings = PlanSettings(max_length=16, cuda=False, dtype="float32")
    planned = plan_memory(base, config, settings).categories
    for category in ("base weights", "embeddings and head", "norms and other", "index", "values"):
        assert planned[category] == real[category], category


@pytest.mark.parametrize("ids", [(99,), (5, 5), (-1,), (1.5,), ("5",), (True,), 5], ids=str)
def test_ids_that_no_embedding_has_are_refused(base: Path, ids: Any) -> None:
    model = load(base)
    with pytest.raises(UserError, match="trainable_token_indices"):
        get_lift_model(model, changed(trainable_token_indices=ids), progress=False)
    get_lift_model(model, TOKENS, progress=False)


def test_trained_tokens_are_not_kept_on_the_cpu() -> None:
    with pytest.raises(UserError, match="embedding_on_cpu keeps an embedding where none of it is"):
        RunArguments("base", "rows", embedding_on_cpu=True, trainable_token_indices="5")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("lift", {"trainable_token_indices": [5, 97]}, "rows of other tokens"),
        ("lift", {"trainable_token_indices": [5]}, "rows of other tokens"),
        ("lift", {"trainable_token_indices": [5, 1000]}, "the embedding has 99 rows"),
        ("embedding", {"shape": [98, 64]}, "broken|entries|has trained tokens of"),
        ("embedding", {"module": "model.norm"}, "does not speak of"),
        ("embedding", {"shape": [99]}, "expected an embedding and its shape"),
        ("embedding", {"module": 3}, "expected an embedding and its shape"),
    ],
)
def test_adapters_that_lie_are_refused(
    base: Path, tmp_path: Path, key: str, value: Any, said: str
) -> None:
    save_adapter(get_lift_model(load(base), TOKENS, progress=False), tmp_path)
    place = tmp_path / "adapter_config.json"
    data = json.loads(place.read_text())
    assert data["format_version"] == 5
    place.write_text(json.dumps({**data, key: {**data[key], **value}}))
    model = load(base)
    with pytest.raises(UserError, match=said):
        load_adapter(model, tmp_path)
    assert not hasattr(model, "leanlift")


def test_they_are_described_and_reported(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_adapter(get_lift_model(load(base), TOKENS, progress=False), tmp_path)
    assert main(["info", str(tmp_path), "--json"]) == 0
    modules = {m["module"]: m["entries"] for m in json.loads(capsys.readouterr().out)["modules"]}
    assert modules["model.embed_tokens"] == 2 * 64
    place = tmp_path / "adapter_config.json"
    data = json.loads(place.read_text())
    for embedding in None, {"module": "a", "shape": 3}:
        place.write_text(json.dumps({**data, "embedding": embedding}))
        assert main(["info", str(tmp_path)]) == 2
        assert "tokens are trained" in capsys.readouterr().err


def test_tokens_that_a_template_adds_are_trained_from_the_command_line(
    base: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps(CHATS[0]) + "\n")
    make_tokens().save_pretrained(tmp_path / "template")
    argv = ["train", "--model_name_or_path", str(base), "--dataset_name", str(rows)]
    argv += ["--output_dir", str(tmp_path / "run"), "--max_steps", "2", "--approx_rank", "4"]
    argv += ["--chat_template_path", str(tmp_path / "template"), "--use_cpu", "true"]
    with monkeypatch.context() as patch:
        run = importlib.import_module("leanlift.training.run")  # a function has its name
        patch.setattr(run, "load_model", lambda *a, **k: pytest.fail("loaded"))
        assert main([*argv, "--trainable_token_indices", "99", "500"]) == 2
    assert "trainable_token_indices has 500" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*argv, "--trainable_token_indices", "99", "--dry_run"]) == 0
    assert main([*argv, "--trainable_token_indices", "99", "--learning_rate", "0.01"]) == 0
    adapter = load_adapter(load(base), tmp_path / "run")
    assert lift_layers(adapter)["model.embed_tokens"].values.abs().max() > 0


@pytest.mark.parametrize("more", [{"trainable_token_indices": (5,)}, {"modules_to_save": "q_proj"}])
def test_no_change_is_proposed_that_these_rule_out(base: Path, more: dict[str, Any]) -> None:
    args = RunArguments(str(base), "rows", approx_rank=8, **more)
    keys = [next(iter(change.keys)) for _, change in changes(args, LiftSFTConfig("x"))]
    assert "density" in keys
    assert ("embedding_on_cpu" in keys) <= ("modules_to_save" in more)
    assert ("quantize_embeddings" in keys) == ("modules_to_save" not in more)
