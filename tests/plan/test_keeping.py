"""Plans that are kept: the same as made, never of other settings, and never an error."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from families import config_of
from planned import arguments
from tiny import make_checkpoint_of

from leanlift import LiftConfig, PlanSettings
from leanlift.layers.lm_head import LIKELIHOOD, Objective
from leanlift.plan import Batch, keeping
from leanlift.plan.base import FakeBase
from leanlift.training import plan_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(keeping.SWITCH, str(tmp_path / "plans"))
    return tmp_path / "plans"


def test_a_kept_plan_is_the_one_that_was_made(
    checkpoints: dict[str, Path], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = arguments(checkpoints["llama"], approx_rank=8, density_pattern={"q_proj": 0.3})
    made = plan_of(*given, cuda=True)
    assert len(list(place.iterdir())) == 1
    monkeypatch.setattr("leanlift.training.plan.plan_memory", None)  # who makes one fails
    assert plan_of(*given, cuda=True) == made
    assert plan_of(*given, cuda=True).work == made.work
    monkeypatch.setenv(keeping.SWITCH, "off")
    with pytest.raises(TypeError):
        plan_of(*given, cuda=True)


def test_what_is_no_plan_is_made_anew(checkpoints: dict[str, Path], place: Path) -> None:
    given = arguments(checkpoints["llama"], approx_rank=8)
    made = plan_of(*given, cuda=False)
    file = next(place.iterdir())
    whole = json.loads(file.read_text())
    for text in (
        "", "{", "[]", "7", json.dumps({**whole, "categories": {}}),
        json.dumps({**whole, "more": 1}), json.dumps({**whole, "phases": {}}),
        json.dumps({**whole, "work": {"times": 1}}),
    ):  # fmt: skip
        file.write_text(text)
        assert keeping._read(file) is None, text
    assert plan_of(*given, cuda=False) == made
    assert json.loads(file.read_text()) == whole


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, place: Path) -> None:
    place.write_text("a file, and no directory")
    assert keeping.kept_plan(lambda: "key", lambda: _plan(1)) == _plan(1)
    assert place.read_text().startswith("a file")


def _plan(nbytes: int) -> Any:
    held = dict.fromkeys(keeping.CATEGORIES, nbytes)
    return keeping.MemoryPlan("some/model", held, {"train": 7}, {}, entries=nbytes)


def test_the_newest_are_kept(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeping, "MOST", 3)
    for number in range(5):
        keeping.kept_plan(lambda n=number: f"{n}", lambda n=number: _plan(n + 1))  # type: ignore[misc]
        for age, file in enumerate(sorted(place.iterdir())):
            os.utime(file, (age + 1, age + 1))
        keeping.kept_plan(lambda: "0", lambda: _plan(1))  # which is of use each time
    assert sorted(file.stem for file in place.iterdir()) == ["0", "3", "4"]


def test_none_are_kept_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> Path:
        raise RuntimeError("no home")

    monkeypatch.delenv(keeping.SWITCH)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nobody)
    assert keeping.directory() is None
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert keeping.directory() == Path("/caches/leanlift/plans")


def test_a_place_that_cannot_be_had_keeps_none(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A home of nobody's, and a directory of somebody else's."""
    monkeypatch.setenv(keeping.SWITCH, "~nobody-is-called-so/plans")
    assert keeping.directory() is None
    monkeypatch.setenv(keeping.SWITCH, str(place))

    def not_yours(*_: Any, **more: Any) -> Any:
        raise PermissionError(13, "Permission denied")

    for name in ("stat", "open", "mkdir"):
        monkeypatch.setattr(Path, name, not_yours)
    assert keeping.kept_plan(lambda: "key", lambda: _plan(1)) == _plan(1)


# --- what decides ---------------------------------------------------------------------------

OTHERS: dict[str, Any] = {
    "mlp_tokens": 4096,
    "target_modules": ("q_proj",), "exclude_modules": ("o_proj",), "modules_to_save": ("q_proj",),
    "trainable_token_indices": (3,), "density_pattern": {"q_proj": 0.5}, "rank_budget": 2,
    "selector": "magnitude", "values_dtype": "bfloat16", "bnb_4bit_quant_type": "fp4",
    "dtype": "float16", "optim": "sparse_adamw", "eval_strategy": "steps", "max_length": 77,
    "largest": Batch(3, 9), "largest_eval": Batch(3, 9), "cuda": True, "retired_limit": 0.25,
    "density": 0.25,
}  # fmt: skip
"""Another value of each field that is neither a switch nor a number."""


def another(settings: Any, name: str) -> Any:
    now = getattr(settings, name)
    value = OTHERS.get(name, (not now) if isinstance(now, bool) else None)
    if value is None:
        value = now + 1 if isinstance(now, int) else now + 0.125
    assert value != now
    return dataclasses.replace(settings, **{name: value})


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> FakeBase:
    place = make_checkpoint_of(config_of("llama"), tmp_path_factory.mktemp("tiny"))
    return FakeBase.of(place)


CONFIG, SETTINGS = LiftConfig(), PlanSettings(cuda=False)


def key(base: FakeBase, config: Any = CONFIG, settings: Any = SETTINGS, **more: Any) -> str | None:
    return keeping.key_of(
        base, config, settings, more.get("objective", LIKELIHOOD), more.get("method", "sft")
    )


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(PlanSettings)])
def test_a_plan_of_other_settings_is_another(name: str, tiny: FakeBase) -> None:
    assert key(tiny, settings=another(SETTINGS, name)) != key(tiny)


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(LiftConfig)])
def test_a_plan_of_another_mask_is_another(name: str, tiny: FakeBase) -> None:
    if name == "rank_budget":  # which takes the place of a density
        assert key(tiny, LiftConfig(rank_budget=2)) != key(tiny)
        return
    assert key(tiny, another(CONFIG, name)) != key(tiny)


def test_a_plan_of_another_model_or_by_other_code_is_another(
    tiny: FakeBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    same = FakeBase.of(tiny.name)
    assert key(same) == key(tiny)
    wider = make_checkpoint_of(config_of("llama", intermediate_size=96), tmp_path / "wider")
    changed = dataclasses.replace(FakeBase.of(wider), name=tiny.name)
    others = [
        key(changed),
        key(tiny, method="dpo"),
        key(tiny, objective=Objective(0.1)),
        key(dataclasses.replace(tiny, attn_implementation="eager")),
        key(dataclasses.replace(tiny, stored={"load_in_8bit": True})),
    ]
    for versions in (("2.0", "b", "c", "d", "e"), ("1.0", "b", "c", "d", "f")):
        monkeypatch.setattr(keeping, "versions", lambda versions=versions: versions)
        others.append(key(tiny))
    monkeypatch.undo()
    (tmp_path / "kernels-1.0.dist-info").mkdir()
    keeping.versions.cache_clear()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    others.append(key(tiny))
    monkeypatch.undo()
    keeping.versions.cache_clear()
    monkeypatch.setattr(inspect, "getfile", lambda kind: str(tmp_path / "configuration_own.py"))
    others.append(key(tiny))
    (tmp_path / "modeling_own.py").write_text("WIDER = True")  # a class that somebody works on
    others.append(key(tiny))
    monkeypatch.undo()
    assert len({*others, key(tiny)}) == len(others) + 1
    for name in ("trust_remote_code", "images"):
        assert key(dataclasses.replace(tiny, **{name: True})) is None
