"""Parts of models that see: loaded without the others on purpose, or trained alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from runs import settings
from safetensors.torch import load_file, save_file
from seeing import make_seeing, rows_with_pictures
from towers import TEXT, tokenizer_with

from leanlift import LiftConfig, LiftTrainer, UserError, get_lift_model
from leanlift.model import lift_layers
from leanlift.plan.auto import parts_left_out
from leanlift.training import RunArguments, run
from leanlift.training.base import check_loads, load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def llama4(path: Path) -> Path:
    """Of a kind whose text part has no word for the tensors beside it."""
    config = transformers.Llama4Config(
        text_config={**TEXT, "vocab_size": len(tokenizer_with("<image>")), "head_dim": 32,
                     "intermediate_size_mlp": 64, "num_local_experts": 2},
        vision_config={"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "intermediate_size": 256, "vision_output_dim": 64, "image_size": 56,
                       "patch_size": 14, "projector_input_dim": 64, "projector_output_dim": 64},
    )  # fmt: skip
    model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    model.save_pretrained(path)
    return path


def loaded(path: Path) -> Any:
    arguments = RunArguments(str(path), "", load_in_4bit=False, dtype="float32")
    return load_model(arguments, torch.device("cpu"))


def test_a_text_part_is_whole_without_the_parts_beside_it(tmp_path: Path) -> None:
    base = llama4(tmp_path / "base")
    model = loaded(base)
    assert type(model).__name__ == "Llama4ForCausalLM"
    config = transformers.AutoConfig.from_pretrained(base)
    assert parts_left_out(config, "base", model) == {"vision_model", "multi_modal_projector"}
    check_loads(base)
    whole = transformers.AutoModelForImageTextToText.from_pretrained(base)
    assert parts_left_out(config, "base", whole) == set()

    file = base / "model.safetensors"
    held = load_file(file)
    name = next(each for each in held if "language_model" in each and ".layers.0." in each)
    for changed, words in (
        ({**held, name.replace(".0.", ".7."): held[name].clone()}, "no place for: .*layers.7"),
        ({key: tensor for key, tensor in held.items() if key != name}, "it lacks"),
    ):
        save_file(changed, file, {"format": "pt"})
        for looks in (loaded, check_loads):
            with pytest.raises(UserError, match=words):
                looks(base)


def trained(base: Path, data: Path, output: Path, **options: Any) -> Any:
    common: dict[str, Any] = {"density": 0.1, "approx_rank": 8, "dtype": "float32"}
    arguments = RunArguments(str(base), str(data), load_in_4bit=False, **common, **options)
    return run(arguments, settings(output, max_steps=2, warmup_steps=0)).model


def test_the_part_that_sees_may_be_trained_alone_over_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, data = make_seeing(tmp_path / "base", "llava"), rows_with_pictures(tmp_path / "rows")
    tower = {"target_modules": ("fc1",)}
    model = trained(base, data, tmp_path / "run", **tower)
    layers = lift_layers(model).values()
    assert len(layers) == 2
    assert all(layer.values.detach().abs().sum() > 0 for layer in layers)
    texts = tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    words = r"fc1: they are in a part .* or train on rows with images"
    with monkeypatch.context() as patched:
        patched.setattr("leanlift.training.base.auto_class", None)  # nothing is loaded
        with pytest.raises(UserError, match=words):
            trained(base, texts, tmp_path / "texts", **tower)
    attached = get_lift_model(
        transformers.AutoModelForImageTextToText.from_pretrained(base),
        LiftConfig(density=0.1, approx_rank=8, **tower), progress=False,
    )  # fmt: skip
    with pytest.raises(UserError, match=words):
        LiftTrainer(attached, settings(tmp_path / "own"), [{"text": "a"}],
                    processing_class=transformers.AutoTokenizer.from_pretrained(base))  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [{"target_modules": ("fc1", "q_proj")}, {"modules_to_save": ("lm_head",)}],
    ids=["beside others", "beside a whole module"],
)
def test_a_tower_that_text_does_not_reach_may_be_named_beside_what_it_does(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    base, texts = make_seeing(tmp_path / "base", "llava"), tmp_path / "texts.jsonl"
    texts.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    model = trained(base, texts, tmp_path / "run", **{"target_modules": ("fc1",), **changes})
    moved = [layer for layer in lift_layers(model).values() if layer.values.detach().abs().sum()]
    assert 0 < len(moved) < len(lift_layers(model))


def test_a_processor_of_images_alone_is_said_to_be_one(tmp_path: Path) -> None:
    base, data = make_seeing(tmp_path / "base", "paligemma"), rows_with_pictures(tmp_path / "rows")
    with pytest.raises(UserError, match="PaliGemmaProcessor takes no text without an image"):
        trained(base, data, tmp_path / "run")
