"""What was written once is read, written, merged and planned in the same way today.

The set is `tests/golden`, `golden_set.py` says what is in it. Keys of a config may get other names;
everything else stays.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_set import (
    ADAPTER_FILES,
    BASES,
    CASES,
    FORMER,
    GOLDEN,
    MERGES,
    PLANS,
    attached,
    make_base,
    merged,
    planned,
    versions,
)
from safetensors.torch import load_file
from sweeps import swept
from tiny import load

from leanlift import LiftConfig, export_peft, load_adapter, save_adapter
from leanlift.adapters import open_adapter

WEIGHTS, CONFIG, FACTS = ADAPTER_FILES
SOME_PLANS = [name for i, name in enumerate(PLANS) if i % 5 == 0]
SHAPES_ALONE = ("categories", "entries", "weights", "holds_for", "context", "notes")
"""Of a plan: what no library decides, but for activations."""


@pytest.fixture(scope="module", autouse=True)
def _beside_the_bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Adapters name their base by a relative path."""
    place = tmp_path_factory.mktemp("bases")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        for name in BASES:
            make_base(name, Path(name))
        yield


def facts_of(directory: Path, file: str = CONFIG) -> dict[str, Any]:
    """An adapter's facts under the names that keys have today."""
    data: dict[str, Any] = json.loads((directory / file).read_text(encoding="utf-8"))
    del data["leanlift_version"]
    return {**data, "lift": LiftConfig.from_dict(data["lift"]).to_dict()}


FORMER_KEYS = {
    "quantize_ends": "quantize_embeddings",
    "rows": "per_device_train_batch_size",
    "tokens": "max_length",
    "accumulation": "gradient_accumulation_steps",
    "double_quantization": "bnb_4bit_use_double_quant",
    "optimizer": "optim",
    "checkpointing": "gradient_checkpointing",
    "offloading": "activation_offloading",
    "in_backward": "optim_in_backward",
    "evaluation_rows": "per_device_eval_batch_size",
}
"""Of a plan's settings, which have other names today."""


SINCE: dict[str, dict[str, Any]] = {
    "categories": {"host": 0, "time": None},
    "per_device_train_batch_size": {
        "stream_base": False,
        "stream_state": False,
        "tiled_mlp": False,
        "mlp_tokens": None,
        "fused_elementwise": False,
        "kept_blocks": 0,
        "reuse_weights": False,
    },
    "6": {"4": True},
}
"""What a plan also says today, by a key of what it is said beside; all of those fit 4 GB."""


def today(golden: Any) -> Any:
    """What was written, under the names that keys have today."""
    if isinstance(golden, dict):
        since = next((more for key, more in SINCE.items() if key in golden), {})
        if "categories" in golden:
            held = golden["categories"]
            learned = held["index"] + held["values"] + held["retired entries"]
            since = {**since, "adapter": learned, "moments": held["optimizer state"]}
        return since | {FORMER_KEYS.get(key, key): today(part) for key, part in golden.items()}
    return golden


def assert_same_adapter(one: Path, other: Path) -> None:
    assert (one / WEIGHTS).read_bytes() == (other / WEIGHTS).read_bytes()
    assert json.dumps(facts_of(one)) == json.dumps(facts_of(other))


@pytest.mark.parametrize("name", CASES)
def test_training_writes_the_same_adapter(name: str, tmp_path: Path) -> None:
    save_adapter(attached(CASES[name], CASES[name].base), tmp_path / "again")
    assert_same_adapter(tmp_path / "again", GOLDEN / name)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_is_loaded_is_saved_as_it_was(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = load_adapter(load(Path(case.base), case.kind), GOLDEN / name)
    save_adapter(model, tmp_path / "again")
    assert_same_adapter(tmp_path / "again", GOLDEN / name)


@pytest.mark.parametrize("name", [*FORMER, "peft"])
def test_other_forms_are_read_as_the_adapter_that_they_are(name: str, tmp_path: Path) -> None:
    """The same offsets and configuration, written by former code or in PEFT's form."""
    case = CASES["nf4"]
    save_adapter(load_adapter(load(Path(case.base), case.kind), GOLDEN / name), tmp_path / "now")
    one, other = (load_file(place / WEIGHTS) for place in (tmp_path / "now", GOLDEN / "nf4"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    with open_adapter(GOLDEN / name) as adapter:
        assert adapter.config == case.lift_config()


def test_the_form_of_peft_is_written_as_it_was(tmp_path: Path) -> None:
    export_peft(GOLDEN / "nf4", tmp_path / "peft", progress=False)
    for file in WEIGHTS, CONFIG:
        assert (tmp_path / "peft" / file).read_bytes() == (GOLDEN / "peft" / file).read_bytes()
    assert facts_of(tmp_path / "peft", FACTS) == facts_of(GOLDEN / "peft", FACTS)


@pytest.mark.parametrize("name", CASES)
def test_switching_gives_what_loading_gives(name: str, tmp_path: Path) -> None:
    """From an adapter of other modules and counts to this one."""
    case = CASES[name]
    other = {**case.config, "target_modules": ["up_proj", "q_proj"], "density": 0.01}
    save_adapter(attached(replace(case, config=other), case.base), tmp_path / "other")
    model = load_adapter(load(Path(case.base), case.kind), tmp_path / "other")
    save_adapter(load_adapter(model, GOLDEN / name), tmp_path / "again")
    assert_same_adapter(tmp_path / "again", GOLDEN / name)


@pytest.mark.parametrize("name", MERGES)
def test_a_merge_is_the_same(name: str, tmp_path: Path) -> None:
    adapter, base, options = MERGES[name]
    expected = json.loads((GOLDEN / "merges.json").read_text())[name]
    assert merged(GOLDEN / adapter, tmp_path / "merged", Path(base), options) == expected


@pytest.mark.parametrize("name", swept(PLANS, *SOME_PLANS))
def test_a_plan_is_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what cuBLAS and attention's kernels take of a card, which plans count since."""
    monkeypatch.setattr("leanlift.plan.sums.workspace_here", lambda: 0)
    monkeypatch.setattr("leanlift.plan.stand_ins._beside", lambda node, query: None)
    golden = json.loads((GOLDEN / "plans.json").read_text())
    expected, found = today(golden["plans"][name]), planned(name, tmp_path / "model")
    if versions() != golden["versions"]:  # other libraries, other activations
        for plan in expected, found:
            del plan["categories"]["activations and workspace"]
        assert {key: found[key] for key in SHAPES_ALONE} == {
            key: expected[key] for key in SHAPES_ALONE
        }
        return
    assert found == expected


def test_a_former_key_of_a_config_is_read(tmp_path: Path) -> None:
    shutil.copytree(GOLDEN / "first", tmp_path / "first")
    file = tmp_path / "first" / CONFIG
    text = file.read_text(encoding="utf-8")
    for former, other in (
        ('"settled_limit": 0.5', '"settled_limit": 0.25'),
        ('"quantize_ends": false', '"quantize_ends": true'),
    ):
        assert former in text
        text = text.replace(former, other)
    file.write_text(text)
    with open_adapter(tmp_path / "first") as adapter:
        assert adapter.config.retired_limit == 0.25
        assert adapter.config.quantize_embeddings
