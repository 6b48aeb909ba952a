"""Which Auto class loads a configuration: what is read out of transformers is what it has."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from leanlift import UserError
from leanlift.cli.kinds import check_kind
from leanlift.io.kinds import (
    CAUSAL,
    IMAGES,
    SOUND,
    auto_class_name,
    classes_of,
    has_encoder,
    is_known,
)
from leanlift.plan.auto import auto_class, auto_class_with, how_loaded

LIVE: dict[str, Any] = {
    CAUSAL: modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    IMAGES: modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    SOUND: modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
}


SEQUENCES = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES


def _configuration(kind: str) -> Any:
    parts = {}
    if kind == "encoder-decoder":
        parts = {side: transformers.BertConfig().to_dict() for side in ("encoder", "decoder")}
    return transformers.CONFIG_MAPPING[kind](**parts)


def test_a_checkpoint_with_an_encoder_is_refused_from_its_config_json(tmp_path: Path) -> None:
    file, told = tmp_path / "config.json", {"model_type": "bart", "is_encoder_decoder": True}
    for names, refused in (
        (["BartModel"], True),
        (["BartForConditionalGeneration"], True),
        (["BartForCausalLM"], False),
        (None, False),
    ):
        file.write_text(json.dumps({**told, "architectures": names}))
        with pytest.raises(UserError, match="with an encoder") if refused else nullcontext():
            check_kind(tmp_path, "x", trusted=False)
    assert has_encoder({"model_type": "t5", "is_encoder_decoder": True})
    own = {**told, "architectures": ["Own"], "auto_map": {CAUSAL: "a.B"}}
    assert not has_encoder(own)
    assert not has_encoder({**told, "is_encoder_decoder": False})


def test_every_kind_has_the_class_that_transformers_has_for_it() -> None:
    for name in (CAUSAL, IMAGES):
        assert classes_of(name) == dict(LIVE[name])
    for kind in CONFIG_MAPPING_NAMES:
        for images in (False, True):
            order = (IMAGES, CAUSAL, SOUND) if images else (CAUSAL, IMAGES, SOUND)
            wanted = next((name for name in order if kind in LIVE[name]), None)
            assert auto_class_name({"model_type": kind}, images) == wanted, kind
    assert is_known("clip")
    assert not is_known("nothing")


def test_code_that_comes_with_a_checkpoint_says_what_it_is_for() -> None:
    config = {"model_type": "own", "auto_map": {"AutoConfig": "a.B", IMAGES: "a.C"}}
    assert auto_class_name(config) == IMAGES
    assert auto_class_name({**config, "auto_map": {CAUSAL: "a.C", IMAGES: "a.D"}}) == CAUSAL
    assert auto_class_name({"model_type": "llama", "auto_map": {"AutoConfig": "a.B"}}) == CAUSAL
    assert auto_class_name({"model_type": "own", "auto_map": None}) is None


def test_the_class_is_found_or_one_sentence() -> None:
    assert auto_class(transformers.LlamaConfig(), "x") is transformers.AutoModelForCausalLM
    assert auto_class(transformers.LlavaConfig(), "x") is transformers.AutoModelForImageTextToText
    sound = auto_class(transformers.Qwen2AudioConfig(), "x")
    assert sound is transformers.AutoModelForMultimodalLM
    with pytest.raises(UserError, match="of the kind clip, which is no causal language model"):
        auto_class(transformers.CLIPConfig(), "x")
    with pytest.raises(UserError, match="with an encoder and writes with a decoder"):
        auto_class(transformers.Florence2Config(), "x")
    for kind, named in SEQUENCES.items():
        config = _configuration(kind)
        config.architectures = [named]
        if config.is_encoder_decoder:
            with pytest.raises(UserError, match="with an encoder and writes with a decoder"):
                auto_class(config, "x")
    decoder = transformers.BartConfig(is_encoder_decoder=False, architectures=["BartForCausalLM"])
    assert auto_class(decoder, "x") is transformers.AutoModelForCausalLM
    own = type("Own", (transformers.LlamaConfig,), {"model_type": "own-kind"})()
    assert auto_class(own, "x") is transformers.AutoModelForCausalLM


def test_a_kind_of_two_classes_is_loaded_as_an_adapter_was_trained() -> None:
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
             "num_key_value_heads": 2, "intermediate_size": 32, "vocab_size": 32}  # fmt: skip
    config = transformers.Qwen3_5Config(text_config={**small, "layer_types": ["full_attention"]})
    text, whole = transformers.AutoModelForCausalLM, transformers.AutoModelForImageTextToText
    name = "layers.0.mlp.up_proj"
    assert auto_class_with(config, "x", [f"model.{name}"]) is text
    assert auto_class_with(config, "x", [f"model.language_model.{name}"]) is whole
    llava = auto_class_with(transformers.LlavaConfig(), "x", ["anything"])
    assert llava is whole

    assert "text part of the checkpoint alone" in str(how_loaded(config, False))
    assert "Qwen3_5ForConditionalGeneration" in str(how_loaded(config, True))
    assert "the rest is frozen" in str(how_loaded(transformers.Gemma3Config(), False))
    assert how_loaded(transformers.LlamaConfig(), True) is None
