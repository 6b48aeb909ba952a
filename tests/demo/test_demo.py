"""How the demo ends, and what it says that a 7B model needs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from snapshots import assert_screen

from benchmarks.plan import MODELS
from leanlift.demo.ending import (
    NEXT,
    SEVEN_B,
    Needs,
    Skill,
    files_text,
    memory_text,
    needs_of_7b,
    seven_b_text,
    skills_text,
)

GIB, MIB = 2**30, 2**20
NEEDS = Needs(peak=int(7.97 * GIB), needed=int(8.52 * GIB))


def test_the_screen_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "adapter_model.safetensors").write_bytes(bytes(277_000))
    (tmp_path / "run" / "memory.png").touch()
    skills = [
        Skill("next", False, 0.0, 1.0, 1.0),
        Skill("copy", True, 1.0, 0.99, 0.99),
        Skill("echo", True, 0.98, 0.97, 0.96),
    ]
    sizes = {"base weights": 3 * MIB, "values": 2 * MIB, "activations and workspace": 15 * MIB}
    memory = {
        "device": "cpu",
        "phases": {},
        "categories": sizes,
        "plan": {"categories": {**sizes, "values": int(2.02 * MIB)}, "phases": {}},
        "capacity": 24 * GIB,
    }
    texts = [
        skills_text(skills, 100),
        memory_text(memory),
        files_text(tmp_path / "run", tmp_path / "merged", tmp_path / "run" / "page.html", 599, 600),
        seven_b_text(NEEDS, None),
        NEXT,
    ]
    assert_screen("\n\n".join(texts), "demo-end", {str(tmp_path): "leanlift-demo"})


@pytest.mark.parametrize(
    ("nbytes", "said"), [(8 * GIB, "lacks 0.52 GiB"), (24 * GIB, "fits, 15.5 GiB free")]
)
def test_the_readers_own_card_is_named(nbytes: int, said: str) -> None:
    text = seven_b_text(NEEDS, ("NVIDIA GeForce RTX 4060", nbytes))
    (line,) = [line for line in text.splitlines() if "RTX 4060" in line]
    assert line.endswith(said)
    assert max(map(len, text.splitlines())) <= 80
    assert ("--fit" in text) == (nbytes < NEEDS.needed)


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_a_7b_model_is_planned_by_the_planner() -> None:
    shape = json.loads((SEVEN_B / "config.json").read_text())
    model = MODELS["Qwen2.5-7B"].to_dict()
    sizes = [key for key in shape if key.endswith(("_size", "_heads", "_layers", "_embeddings"))]
    assert len(sizes) == 8
    for key in set(sizes) - {"max_position_embeddings"}:
        assert shape[key] == model[key], key
    needs = needs_of_7b()
    assert 6 * GIB < needs.peak < needs.needed < 10 * GIB
