"""Models that see, from the command's own run: rows of text, rows with pictures, and the merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, Value
from runs import settings
from safetensors.torch import load_file
from seeing import make_seeing, picture, rows_with_pictures
from sweeps import swept
from tiny import quantization
from towers import SEEING, WITH_PROCESSOR
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, LlavaModel
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model, load_adapter, plan_memory
from leanlift.evaluation.verify import verify_merged
from leanlift.export import merge_adapter
from leanlift.model import lift_layers
from leanlift.training import RunArguments, run

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def rows_of_text(directory: Path) -> Path:
    file = directory / "texts.jsonl"
    rows = [{"prompt": f"{i} is ", "completion": str(i)} for i in range(4)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def arguments(base: Path, data: Path, **changes: Any) -> RunArguments:
    options: dict[str, Any] = {"density": 0.1, "approx_rank": 8, "dtype": "float32", **changes}
    return RunArguments(str(base), str(data), **options)


def trained(base: Path, data: Path, output: Path, **changes: Any) -> Any:
    return run(arguments(base, data), settings(output, max_steps=2, **changes)).model.eval()


def whole(place: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(place, dtype=torch.float32).eval()


@torch.no_grad()
def logits_of_text(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 43).reshape(2, 20)).logits


@torch.no_grad()
def logits_of_a_picture(model: Any, place: Path) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(place)
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}]
    text = processor.apply_chat_template(turns, add_generation_prompt=True)
    return model(**processor(text=[text], images=[[picture(0)]], return_tensors="pt")).logits


def tensors_of(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


@pytest.mark.parametrize("kind", swept(SEEING, "qwen3_5"))
def test_text_trains_the_language_model_and_the_merge_is_the_whole_checkpoint(
    kind: str, tmp_path: Path
) -> None:
    base, output = make_seeing(tmp_path / "base", kind), tmp_path / "run"
    model = trained(base, rows_of_text(tmp_path), output)
    names = list(lift_layers(model))
    assert names
    assert not any("vision" in name or "visual" in name for name in names)

    merge_adapter(output, tmp_path / "exact", onto="quantized", dtype="float32", progress=False)
    merged = whole(tmp_path / "exact")
    assert torch.allclose(logits_of_text(merged), logits_of_text(model), atol=1e-5)

    report = merge_adapter(output, tmp_path / "merged", dtype="float32", progress=False)
    before, after = tensors_of(base), tensors_of(tmp_path / "merged")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == len(names)
    assert all(".layers." in name and "vision" not in name for name in changed)
    assert verify_merged(output, report).effect > 0
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "AutoModelForImageTextToText.from_pretrained" in card
    assert "pipeline_tag: image-text-to-text" in card


def test_a_model_that_asks_for_the_types_of_its_tokens_is_told_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As several do, in some versions of transformers, while they train."""
    base, stock = make_seeing(tmp_path / "base", "llava"), LlavaModel.forward
    seen: list[Any] = []

    def asks(self: Any, *args: Any, token_type_ids: Any = None, **given: Any) -> Any:
        if self.training and token_type_ids is None:
            raise ValueError("`token_type_ids` is required as a model input when training")
        seen.append(token_type_ids)
        return stock(self, *args, **given)

    monkeypatch.setattr(LlavaModel, "forward", asks)
    trained(base, rows_of_text(tmp_path), tmp_path / "run")
    assert seen[-1].shape == seen[-1].new_zeros(4, seen[-1].shape[1]).shape
    assert not seen[-1].any()
    assert plan_memory(base).peak > 0

    def stumbles(self: Any, *args: Any, **given: Any) -> Any:
        return stock(self, *args, **given) if not self.training else self.nothing_of_it

    monkeypatch.setattr(LlavaModel, "forward", stumbles)
    with pytest.raises(UserError, match=r"cannot be trained on rows of text.*nothing_of_it"):
        trained(base, rows_of_text(tmp_path), tmp_path / "again")


@pytest.mark.parametrize("kind", swept(WITH_PROCESSOR, "llava"))
def test_pictures_are_trained_on_as_the_stock_model_sees_them(kind: str, tmp_path: Path) -> None:
    base, output = make_seeing(tmp_path / "base", kind), tmp_path / "run"
    data = rows_with_pictures(tmp_path / "rows")
    log: list[float] = []
    model = run(
        arguments(base, data, load_in_4bit=False),
        settings(output, max_steps=2, per_device_train_batch_size=4, max_length=8),
        before_training=lambda attached, _: log.append(_loss_on(attached, base)),
    ).model.eval()
    history = json.loads((output / "trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == pytest.approx(log[0], rel=1e-4)  # nothing was cut to max_length
    merge_adapter(output, tmp_path / "merged", dtype="float32", progress=False)
    merged = whole(tmp_path / "merged")
    found = logits_of_a_picture(merged, tmp_path / "merged")
    assert torch.allclose(found, logits_of_a_picture(model, output), atol=1e-5)
    assert not torch.allclose(found, logits_of_a_picture(whole(base), base), atol=1e-3)
    again = load_adapter(whole(base), output)
    assert torch.equal(logits_of_text(again), logits_of_text(model))


def _loss_on(model: Any, base: Path) -> float:
    """The stock model's own loss over answers about four pictures."""
    processor = AutoProcessor.from_pretrained(base)
    rows = [
        {"images": [picture(i)], "prompt": [{"role": "user", "content": f"what is {i}?"}],
         "completion": [{"role": "assistant", "content": f"a picture of {i}"}]}
        for i in range(4)
    ]  # fmt: skip
    batch = DataCollatorForVisionLanguageModeling(processor, completion_only_loss=True)(rows)
    with torch.no_grad():
        return float(model.train()(**batch).loss)


@pytest.mark.thorough
def test_an_adapter_over_the_part_that_sees_is_loaded_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a kind that is loaded without it for rows of text."""
    base, output = make_seeing(tmp_path / "base", "qwen3_5"), tmp_path / "run"
    form = quantization("nf4")
    stock = AutoModelForImageTextToText.from_pretrained(
        base, dtype=torch.float32, quantization_config=form
    )
    model = get_lift_model(stock, LiftConfig(density=0.1, approx_rank=8), progress=False)
    rows = [{"prompt": "a", "completion": "b"}] * 4
    trainer = LiftTrainer(model, settings(output, max_steps=2, warmup_steps=0), rows,
                          processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    trainer.train()
    trainer.save_model()
    rows_file = rows_of_text(tmp_path)
    for onto in ("original", "quantized"):
        report = merge_adapter(output, tmp_path / onto, onto=onto, dtype="float32", progress=False)
        assert verify_merged(output, report, str(rows_file)).effect > 0


FILES = ("processor_config.json", "preprocessor_config.json")


def test_the_processor_goes_with_the_adapter_and_the_merge(tmp_path: Path) -> None:
    base, output = make_seeing(tmp_path / "base", "llava"), tmp_path / "run"
    own = {"auto_map": {"AutoImageProcessor": "base.Own"}, "image_processor_type": "X"}
    (base / FILES[1]).write_text(json.dumps(own))
    trained(base, rows_of_text(tmp_path), output)
    assert all((output / name).read_text() == (base / name).read_text() for name in FILES)

    evil = {"auto_map": {"AutoImageProcessor": "evil.Evil"}}
    changed = {**own, **evil, "size": 7, "part": {**evil, "a": 1}}
    (output / FILES[1]).write_text(json.dumps(changed))
    (output / FILES[0]).unlink()
    merge_adapter(output, tmp_path / "merged", progress=False)
    assert json.loads((tmp_path / "merged" / FILES[1]).read_text()) == {
        **own, "size": 7, "part": {"a": 1},
    }  # fmt: skip
    assert not (tmp_path / "merged" / FILES[0]).exists()  # all of them come from one source

    (output / FILES[1]).write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        merge_adapter(output, tmp_path / "again", progress=False)
    (output / FILES[1]).unlink()
    (output / FILES[1]).symlink_to(tmp_path / "texts.jsonl")
    with pytest.raises(UserError, match="outside of its"):
        merge_adapter(output, tmp_path / "again", progress=False)
    assert not (tmp_path / "again").exists()


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PLACES = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]}, CHAT[1]]


def test_rows_with_pictures_that_cannot_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_seeing(tmp_path / "base", "llava")
    monkeypatch.setattr("leanlift.training.base.auto_class", None)  # nothing is loaded
    picture(0).save(tmp_path / "0.png")
    data = tmp_path / "rows.jsonl"

    def refused(words: str, *rows: Any, args: Any = None, **changes: Any) -> None:
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=words):
            run(arguments(base, data, **(args or {})), settings(tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists()

    good = {"images": ["0.png"], "messages": CHAT}
    refused("no file on this", {"images": ["none.png"], "messages": CHAT})
    refused("no file on this", {"image": "https://a.b/c.png", "messages": CHAT})
    refused("something else than images", {"images": [3], "messages": CHAT})
    refused("0 images, and 1 places", good, {"images": [], "messages": PLACES})
    refused("2 images, and 1 places", {"images": ["0.png"] * 2, "messages": PLACES})
    refused("beside plain texts", {"image": "0.png", "text": "a"})
    refused("expected texts, and", {**good, "messages": [{"role": "user", "content": [
        {"type": "image", "url": "x"}]}, CHAT[1]]})  # fmt: skip
    refused("expected texts, and", {**good, "messages": [{"role": "user", "content": [
        {"type": "video"}]}, CHAT[1]]})  # fmt: skip
    refused("an image in an answer", {**good, "messages": [CHAT[0], {
        "role": "assistant", "content": [{"type": "image"}]}]})  # fmt: skip
    refused("tools or chat_template_kwargs", {**good, "tools": [{"type": "function"}]})
    refused("0 times <image>", {"image": "0.png", "prompt": "no place", "completion": "b"})
    refused("trained with packing", good, packing=True)
    refused("trained with padding_free", good, padding_free=True, max_length=None)
    refused("assistant_only_loss", good, assistant_only_loss=True)
    refused("selector=gradient", good, args={"selector": "gradient"})
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"messages": CHAT}) + "\n")
    refused("eval dataset has no images", good, args={"eval_dataset_name": str(texts)})
    pictures = tmp_path / "pictures.jsonl"
    pictures.write_text(json.dumps(good) + "\n")
    plain = {"prompt": "a", "completion": "b"}
    refused("eval dataset has images", plain, args={"eval_dataset_name": str(pictures)})
    refused("chat_template_path", good, chat_template_path=str(base))
    refused("<image> in a text", good, {**good, "messages": [
        {"role": "user", "content": "<image>q"}, CHAT[1]]})  # fmt: skip
    refused("<image> in a text", {**good, "messages": [CHAT[0], {
        "role": "assistant", "content": "<image>"}]})  # fmt: skip
    (tmp_path / "cut.png").write_bytes((tmp_path / "0.png").read_bytes()[:400])
    refused(r"cut\.png, which cannot be read", *[good] * 40, {**good, "images": ["cut.png"]})
    (base / "processor_config.json").unlink()
    refused("the processor of .* cannot be loaded|no processor of images", good)
    monkeypatch.setattr("leanlift.data.images.find_spec", lambda name: None)
    refused("pip install pillow", good)


def given_rows(kind: str, directory: Path) -> Any:
    """The same four rows, in each way in which they may come."""
    file = rows_with_pictures(directory)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    pictures = [picture(number) for number in range(4)]
    if kind == "list":
        return [{**row, "images": [one]} for row, one in zip(rows, pictures, strict=True)]
    if kind == "single":
        return [{"image": one, "messages": row["messages"]}
                for row, one in zip(rows, pictures, strict=True)]  # fmt: skip
    turn = {"role": Value("string"), "content": Value("string")}
    features = Features({"images": List(Image()), "messages": List(turn)})
    stored = Dataset.from_list([{**row, "images": [one]} for row, one in zip(
        rows, pictures, strict=True)], features=features)  # fmt: skip
    if kind == "dataset":
        return stored
    stored.to_parquet(directory / "rows.parquet")
    return Dataset.from_parquet(str(directory / "rows.parquet"), cache_dir=str(directory / "c"))


@pytest.mark.parametrize("kind", swept(["list", "single", "dataset", "parquet"], "list"))
def test_pictures_may_come_in_several_ways(kind: str, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "llava")
    model = get_lift_model(whole(base), LiftConfig(density=0.1, approx_rank=8), progress=False)
    with pytest.raises(UserError, match="is no processor of images"):
        LiftTrainer(model, settings(tmp_path / "run"), given_rows(kind, tmp_path / "rows"),
                    processing_class=AutoTokenizer.from_pretrained(base))  # fmt: skip
    trainer = LiftTrainer(model, settings(tmp_path / "run"), given_rows(kind, tmp_path / "rows"))
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    shown = trainer.processing_class.image_processor(
        [picture(i) for i in range(4)], return_tensors="pt"
    )
    assert torch.equal(batch["pixel_values"], shown["pixel_values"])
    assert trainer.args.max_length == 64  # is the user's


def test_a_chat_of_several_turns_has_the_pictures_that_came_so_far(tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "llava")
    model = get_lift_model(whole(base), LiftConfig(density=0.1, approx_rank=8), progress=False)
    rows = [{"images": [picture(0), picture(1)], "messages": [*PLACES, *PLACES]}]
    made = LiftTrainer(model, settings(tmp_path / "run"), rows).train_dataset
    assert [len(row["images"]) for row in made] == [1, 2]
    assert [len(row["prompt"]) for row in made] == [1, 3]


@pytest.mark.thorough
def test_a_run_over_pictures_is_gone_on_with(tmp_path: Path) -> None:
    base, output = make_seeing(tmp_path / "base", "llava"), tmp_path / "run"
    data = rows_with_pictures(tmp_path / "rows")
    options: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    through = run(arguments(base, data), settings(output, **options)).model
    shutil.rmtree(output / "checkpoint-4")
    for name in ("adapter_model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    again = run(arguments(base, data), settings(output, **options, resume_from_checkpoint="true"))
    for one, two in zip(
        lift_layers(through).values(), lift_layers(again.model).values(), strict=True
    ):
        assert torch.equal(one.values, two.values)
