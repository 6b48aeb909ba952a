"""The language model in a model that sees or hears: which blocks are trained, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from seeing import make_seeing
from torch import nn
from towers import SEEING, TEXT, TOWER

from leanlift import LiftConfig, get_lift_model
from leanlift.model import lift_layers
from leanlift.model.blocks import block_lists, in_language, other_towers
from leanlift.model.targets import find_targets
from leanlift.plan.auto import auto_class

SOUND = {"d_model": 64, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64,
         "num_mel_bins": 16, "max_source_positions": 32}  # fmt: skip
HEARING: dict[str, Any] = {
    "qwen2_audio": transformers.Qwen2AudioConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": 64}, audio_config=SOUND
    ),
    "mistral3": transformers.Mistral3Config(
        text_config={**TEXT, "model_type": "mistral", "vocab_size": 64},
        vision_config={**TOWER, "model_type": "pixtral", "head_dim": 16},
    ),
    "smolvlm": transformers.SmolVLMConfig(
        text_config={**TEXT, "model_type": "llama", "vocab_size": 64}, vision_config=TOWER,
        scale_factor=2, image_token_id=5,
    ),
    "internvl": transformers.InternVLConfig(
        text_config={**TEXT, "model_type": "qwen2", "vocab_size": 64},
        vision_config={**TOWER, "image_size": [16, 16], "patch_size": [8, 8]},
    ),
    "paligemma": transformers.PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "vocab_size": 64},
        vision_config={**TOWER, "model_type": "siglip_vision_model", "projection_dim": 64},
    ),
}  # fmt: skip


def made(kind: str) -> Any:
    config = HEARING[kind] if kind in HEARING else SEEING[kind]()[0]
    return auto_class(config, kind, images=True).from_config(config)


@pytest.mark.parametrize("kind", [*HEARING, *SEEING])
def test_a_preset_trains_what_text_goes_through_and_no_more(kind: str) -> None:
    """What text goes through is seen from the modules that run on it."""
    model, ran = made(kind).eval(), set[str]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *_, name=name: ran.add(name))
    with torch.no_grad():
        model(input_ids=torch.arange(6, 14).view(1, 8))
    head = next(n for n, m in model.named_modules() if m is model.get_output_embeddings())
    assert set(find_targets(model, "all-linear")) == ran - {head}
    assert not set(find_targets(model, "mlp")) - ran
    towers = other_towers(dict(model.named_modules()))
    assert len(towers) == 1
    (tower, weights), = towers.items()  # fmt: skip
    assert weights == sum(p.numel() for p in model.get_submodule(tower).parameters())
    assert not any(each.startswith(tower) for each in block_lists(model))


def test_what_is_named_is_of_the_language_model_where_that_has_it() -> None:
    model = made("gemma3")
    assert all("language_model" in n for n in find_targets(model, ("q_proj", "fc1")) if "q_" in n)
    both = find_targets(model, ("q_proj", "fc1"))
    assert sum("vision_tower" in name for name in both) == 2  # fc1 is in the tower alone
    full = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
    assert find_targets(model, (full,)) == [full]


def test_what_text_does_not_reach_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    base = make_seeing(tmp_path / "base", "gemma3")

    def attached(wanted: Any) -> str:
        caplog.clear()
        stock = transformers.AutoModelForImageTextToText.from_pretrained(base)
        config = LiftConfig(density=0.1, approx_rank=8, target_modules=wanted)
        model = get_lift_model(stock, config, progress=False)
        assert all(("vision" in name) == (wanted == ("fc1",)) for name in lift_layers(model))
        return caplog.text

    assert "model.vision_tower (" in attached("all-linear")
    assert "beside the language model" in caplog.text
    assert "Rows of text give 2 of the matrices named no gradient" in attached(("fc1",))
    assert not attached(("q_proj",))


class Odd(nn.Module):
    """Blocks beside the embedding, a tower between them, and an embedding that nobody knows."""

    def __init__(self, known: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.vision = nn.Module()
        self.vision.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.known = known

    def get_input_embeddings(self) -> nn.Module:
        if not self.known:
            raise NotImplementedError
        return self.embed


def test_a_tower_beside_the_blocks_is_told_by_its_name() -> None:
    assert block_lists(Odd()) == block_lists(Odd(known=False)) == ["layers"]
    assert block_lists(nn.Sequential(nn.ModuleList([nn.Linear(4, 4)]))) == ["0"]
    only = Odd().vision
    assert in_language(dict(only.named_modules()), ["layers"]) == ["layers"]
