"""What is said of places: what a directory is good for."""

from __future__ import annotations

import json
from pathlib import Path

from leanlift.io.places import export_words


def test_an_adapter_is_merged_onto_what_its_base_has(tmp_path: Path) -> None:
    plain = ["leanlift", "export", "run", "MERGED"]
    assert export_words("run", "somebody/base") == plain
    assert export_words("run", str(tmp_path / "gone")) == plain
    config = tmp_path / "config.json"
    for text, quantized in (
        ('{"model_type": "llama"}', False),
        (json.dumps({"quantization_config": {"load_in_4bit": True}}), True),
        ('{"quantization_config": null}', False),
        ("[1]", False),
        ("{", False),
    ):
        config.write_text(text)
        wanted = [*plain, "--onto", "quantized"] if quantized else plain
        assert export_words("run", str(tmp_path)) == wanted, text
