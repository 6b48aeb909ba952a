"""Linears that are trained whole, inside the blocks and outside: heads, new ones too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import settings, trainer_for
from sweeps import swept
from tiny import FORMATS, load, make_checkpoint, quantization
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

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
from leanlift.adapters.task import Task
from leanlift.measure.meter import static_categories
from leanlift.model import lift_layers
from leanlift.sparse import SegmentedIndex
from leanlift.training import LiftTrainer

IDS = torch.arange(36).view(4, 9) % 90
HEAD = LiftConfig(density=0.1, approx_rank=8, modules_to_save=("lm_head",))
SCORE = LiftConfig(density=0.1, approx_rank=8, modules_to_save=("score",))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("base") / "base", tied=False)


def classifier(base: Path, kind: str = "nf4+double", labels: int = 3) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(
        base,
        quantization_config=quantization(kind),
        dtype=torch.float32,
        num_labels=labels,
        pad_token_id=0,
    )


def train(model: Any, steps: int = 4, **labels: Any) -> None:
    optimizer = SparseAdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(steps):
        model(IDS, **labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def test_a_full_index_is_every_position() -> None:
    for shape in (1, 1), (3, 254), (2, 255), (5, 256), (2, 1000):
        index = SegmentedIndex.full(shape)
        same = SegmentedIndex.from_flat(torch.arange(shape[0] * shape[1]), shape)
        assert index.is_full
        assert torch.equal(index.to_flat(), same.to_flat())
        assert torch.equal(index.anchors, same.anchors)
    assert not SegmentedIndex.from_flat(torch.arange(5), (2, 3)).is_full


@pytest.mark.parametrize("kind", swept(FORMATS, "nf4+double", "dense"))
def test_a_classifier_is_trained_saved_loaded_and_merged(
    base: Path, tmp_path: Path, kind: str
) -> None:
    model = get_lift_model(classifier(base, kind), SCORE, progress=False)
    begun = model(IDS).logits
    assert model.leanlift.base.new == ("score",)
    assert not lift_layers(model)["score"].base.weight.any()  # type: ignore[union-attr,operator]
    train(model, labels=torch.tensor([0, 1, 2, 1]))
    refresh_mask(model)
    expected = model(IDS).logits
    assert (expected - begun).abs().max() > 0.05
    save_adapter(model, tmp_path / "adapter")

    other = classifier(base, kind)
    assert not torch.equal(other.score.weight, torch.zeros(3, 64))
    assert torch.equal(load_adapter(other, tmp_path / "adapter").eval()(IDS).logits, expected)
    report = merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=1e-5)
    assert merged.config.architectures == ["LlamaForSequenceClassification"]
    assert merged.config.num_labels == 3
    assert report.merged == 15


def test_a_classifier_that_is_a_base_has_its_head(base: Path, tmp_path: Path) -> None:
    model = get_lift_model(classifier(base), SCORE, progress=False)
    save_adapter(model, tmp_path / "adapter")
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False)
    again = get_lift_model(classifier(tmp_path / "merged"), SCORE, progress=False)
    assert again.leanlift.base.new == ()
    train(again, labels=torch.tensor([0, 1, 2, 1]))
    save_adapter(again, tmp_path / "second")
    loaded = load_adapter(classifier(tmp_path / "merged"), tmp_path / "second").eval()
    assert torch.equal(loaded(IDS).logits, again(IDS).logits)
    with pytest.raises(UserError, match=r"trained with a new score on .* but the base has score"):
        merge_adapter(tmp_path / "adapter", tmp_path / "no", tmp_path / "merged", progress=False)


def test_a_head_is_trained_by_the_trainer_and_merged(base: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 3}
    lift = LiftConfig(**{**HEAD.to_dict(), "refresh_interval": 2})
    trainer = trainer_for(base, tmp_path / "run", lift, **options)
    trainer.train()
    model = trainer.model.eval()
    head = lift_layers(model)["lm_head"]
    assert head.index.is_full
    assert head.values.abs().max() > 0
    again = trainer_for(base, tmp_path / "run", lift, **options)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(lift_layers(again.model)["lm_head"].values, head.values)
    save_adapter(model, tmp_path / "adapter")
    assert torch.equal(
        load_adapter(load(base), tmp_path / "adapter").eval()(IDS).logits, model(IDS).logits
    )
    merge_adapter(
        tmp_path / "adapter", tmp_path / "merged", dtype="float32", onto="quantized", progress=False
    )
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(stock(IDS).logits, model(IDS).logits, atol=2e-5, rtol=1e-5)


def test_gradients_of_a_whole_head_are_dense_ones(base: Path) -> None:
    model = get_lift_model(load(base, "dense"), HEAD, progress=False)
    stock = load(base, "dense")
    stock.requires_grad_(False)
    stock.lm_head.weight.requires_grad_(True)
    for each in model, stock:
        each(IDS, labels=IDS).loss.backward()
    found = lift_layers(model)["lm_head"].values.grad
    assert found is not None
    torch.testing.assert_close(found.view(-1, 64), stock.lm_head.weight.grad, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "modules",
    swept(["lm_head", "q_proj", ("lm_head", "down_proj")], ("lm_head", "down_proj"), whole=True),
    ids=str,
)
def test_a_plan_counts_what_is_trained_whole(base: Path, modules: Any) -> None:
    config = LiftConfig(density=0.1, approx_rank=8, modules_to_save=modules)
    real = static_categories(get_lift_model(load(base), config, progress=False))
    settings = PlanSettings(max_length=16, cuda=False, dtype="float32")
    planned = plan_memory(base, config, settings).categories
    for category in ("base weights", "embeddings and head", "norms and other", "index", "values"):
        assert planned[category] == real[category], category


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"modules_to_save": "nothing"}, "matches nothing in this LlamaForCausalLM"),
        ({"modules_to_save": "norm"}, "is a LlamaRMSNorm: leanlift trains whole Linears alone"),
        ({"modules_to_save": "embed_tokens"}, "is a Embedding: .* trainable_token_indices"),
        ({"modules_to_save": "lm_head", "quantize_embeddings": True}, "held in INT8"),
    ],
)
def test_what_cannot_be_trained_whole_is_said_and_changes_nothing(
    base: Path, changes: dict[str, Any], said: str
) -> None:
    model = load(base)
    with pytest.raises(UserError, match=said):
        get_lift_model(model, LiftConfig(approx_rank=8, **changes), progress=False)
    get_lift_model(model, LiftConfig(approx_rank=8), progress=False)


def test_a_head_that_is_tied_or_grows_is_not_trained_whole(base: Path, tmp_path: Path) -> None:
    model = load(base)
    with pytest.raises(UserError, match="the vocabulary grows to 120 rows"):
        get_lift_model(model, HEAD, progress=False, embedding_rows=120)
    get_lift_model(model, HEAD, progress=False)
    tied = load(make_checkpoint(tmp_path / "tied", tied=True))
    with pytest.raises(UserError, match="lm_head is tied to the embedding"):
        get_lift_model(tied, HEAD, progress=False)


def test_a_new_head_with_a_bias_is_refused(base: Path) -> None:
    model = classifier(base)
    model.score = torch.nn.Linear(64, 3)
    with pytest.raises(UserError, match=r"score is new.* and it has a bias"):
        get_lift_model(model, SCORE, progress=False)


def test_a_classifier_is_refused_where_a_language_model_is_wanted(
    base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="or name it in modules_to_save"):
        get_lift_model(classifier(base), LiftConfig(approx_rank=8), progress=False)
    model = get_lift_model(classifier(base), SCORE, progress=False)
    with pytest.raises(UserError, match="LlamaForSequenceClassification has no head for"):
        LiftTrainer(model=model, args=settings(tmp_path), train_dataset=[{"text": "a"}])
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(UserError, match="of a LlamaForSequenceClassification, not of a LlamaForC"):
        load_adapter(load(base), tmp_path / "adapter")
    with pytest.raises(UserError, match="a new score, which PEFT's SHiRA has no place for"):
        export_peft(tmp_path / "adapter", tmp_path / "peft", progress=False)
    with pytest.raises(UserError, match="is 3x64; the loaded model"):
        load_adapter(classifier(base, labels=2), tmp_path / "adapter")


def test_heads_of_one_kind_are_combined(base: Path, tmp_path: Path) -> None:
    for name, labels in ("one", 3), ("two", 3), ("other", 2):
        model = get_lift_model(classifier(base, labels=labels), SCORE, progress=False)
        save_adapter(model, tmp_path / name)
    combine_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "sum", [0.5, 0.5])
    summed = load_adapter(classifier(base), tmp_path / "sum").eval()
    parts = [load_adapter(classifier(base), tmp_path / name) for name in ("one", "two")]
    mean = sum(lift_layers(part)["score"].values for part in parts) / 2
    torch.testing.assert_close(lift_layers(summed)["score"].values, mean)
    with pytest.raises(UserError, match="can be combined"):
        combine_adapters([tmp_path / "one", tmp_path / "other"], tmp_path / "no")


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "os.system"},
        {"architecture": 3},
        {"labels": ["a\x1b[2J"]},
        {"labels": "abc"},
        {"labels": [1, 2]},
        {"problem_type": "other"},
        {"more": 1},
    ],
    ids=str,
)
def test_a_task_that_none_has_is_refused(base: Path, tmp_path: Path, change: Any) -> None:
    known = Task("LlamaForSequenceClassification", ("no", "yes")).to_dict()
    assert Task.from_dict(known).labels == ("no", "yes")
    with pytest.raises(UserError, match="expected the class of a model"):
        Task.from_dict({**known, **change})


def test_names_of_new_matrices_are_checked(base: Path, tmp_path: Path) -> None:
    save_adapter(get_lift_model(classifier(base), SCORE, progress=False), tmp_path)
    place = tmp_path / "adapter_config.json"
    data = json.loads(place.read_text())
    assert data["format_version"] == 5
    for new in ["other"], "score", [1]:
        place.write_text(json.dumps({**data, "base": {**data["base"], "new": new}}))
        with pytest.raises(UserError, match="expected names of trained matrices"):
            load_adapter(classifier(base), tmp_path)
    del data["task"]
    place.write_text(json.dumps(data))
    with pytest.raises(UserError, match="it lacks 'task'"):
        load_adapter(classifier(base), tmp_path)


def test_a_head_that_is_new_has_no_base_to_go_back_to(base: Path) -> None:
    model = get_lift_model(classifier(base), SCORE, progress=False)
    stock = model.eval()(IDS).logits
    train(model, labels=torch.tensor([0, 1, 2, 1]))
    head = lift_layers(model)["score"].values.detach().clone()
    scale_adapter(model, 0.0)
    assert torch.equal(lift_layers(model)["score"].learned.active.values, head)
    assert model(IDS).logits.abs().max() > 0.1 * stock.abs().max()
    with pytest.raises(UserError, match="score is new, so there is no base to go back to"):
        unload_adapter(model)


def test_what_any_of_several_trains_whole_is_whole_in_their_sum(base: Path, tmp_path: Path) -> None:
    plain = LiftConfig(density=0.1, approx_rank=8)
    for name, config in {"plain": plain, "whole": HEAD}.items():
        model = get_lift_model(load(base), config, progress=False)
        train(model, labels=IDS)
        save_adapter(model, tmp_path / name)
    for first, second in ("plain", "whole"), ("whole", "plain"):
        out = tmp_path / f"{first}-{second}"
        combine_adapters([tmp_path / first, tmp_path / second], out, [0.5, 0.5])
        summed = lift_layers(load_adapter(load(base), out))["lm_head"].values
        half = lift_layers(model)["lm_head"].values / 2
        torch.testing.assert_close(summed, half)
