"""`leanlift doctor`: what it finds here, on machines that are made up, and where looks fail."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from command import complaint

from leanlift.cli import fitting as planned
from leanlift.cli import looks, looks_kernels, main
from leanlift.demo.known import KNOWN

GIB = 2**30


def told(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, dict[str, Any]]:
    """The exit code, and what is printed as JSON."""
    code = main(["doctor", "--json", *argv])
    return code, json.loads(capsys.readouterr().out)


@pytest.fixture
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(looks, "_driver", lambda: None)


@pytest.mark.usefixtures("no_card")
def test_a_machine_that_is_well(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = told(capsys)
    assert found["problems"] == []
    assert code == 0
    assert found["looks"]["installed"]["torch"] == torch.__version__
    assert found["looks"]["kernels"]["NF4, cpu"] == "right"
    assert found["looks"]["kernels"]["ops, cpu"] == "torch, right"
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert text.endswith("All is well.\n")
    assert all(len(line) <= 84 for line in text.splitlines())


def broken() -> Any:
    raise OSError("libcudart.so.12: cannot open shared object file")


@pytest.mark.usefixtures("no_card")
def test_looks_that_fail_and_what_is_wrong_are_told_and_the_others_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    versions = importlib.metadata.version

    def version(name: str) -> str:
        if name == "peft":
            raise importlib.metadata.PackageNotFoundError(name)
        return "4.1.0" if name == "transformers" else versions(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(looks, "machine", broken)
    monkeypatch.setattr(looks, "_driver", lambda: "535.54")
    monkeypatch.setattr(looks_kernels, "_four_bits", lambda device: "wrong: values come back")
    monkeypatch.setattr(looks.os, "access", lambda place, how: False)
    code, found = told(capsys)
    assert code == 1
    assert "libcudart" in found["looks"]["machine"]["failed"]
    assert found["looks"]["hub"]["cache"]
    starts = ("peft is not", "transformers 4.1.0 is", "machine could not", "there is an NVIDIA",
              "bitsandbytes' 4-bit weights are wrong on cpu", "/")  # fmt: skip
    assert len(found["problems"]) == len(starts), found["problems"]
    for start, problem in zip(starts, found["problems"], strict=True):
        assert problem.startswith(start)


def test_libraries_that_cannot_be_imported(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = looks_kernels.kernels()
    assert "cannot be imported" in found.facts["Triton"]
    (problem,) = found.problems
    assert problem.startswith("bitsandbytes cannot be imported")
    assert "NF4, cpu" not in found.facts


def test_a_card_that_torch_has_no_kernels_for(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="GeForce GTX 980", total_memory=4 * GIB, major=5, minor=2)
    for name, value in {
        "is_available": True, "device_count": 1, "mem_get_info": (3 * GIB, 4 * GIB),
        "get_device_properties": card, "get_arch_list": ["sm_75", "sm_80", "compute_90"],
        "is_bf16_supported": False,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    found = looks.cards()
    assert found.facts["cards"][0]["capability"] == [5, 2]
    (problem,) = found.problems
    assert "no kernels for GeForce GTX 980 (compute capability 5.2" in problem
    assert looks.card_sizes() == [4.0]


@pytest.mark.parametrize(
    ("capability", "compiled", "runs"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((12, 0), ["sm_90a", "sm_120"], True),
        ((10, 3), ["sm_100a"], False),
        ((7, 0), ["compute_75"], False),
        ((8, 0), ["gfx90a"], False),
    ],
    ids=str,
)
def test_which_code_runs_on_which_card(
    capability: tuple[int, int], compiled: list[str], runs: bool
) -> None:
    assert looks.has_kernels(capability, compiled) is runs


def test_changes_are_made_until_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = iter([5.0, 4.0, 4.0, 3.0, 2.0, 1.0, 0.5])

    def plan_of(*_: Any) -> Any:
        needed = int(next(sizes) * GIB)
        return SimpleNamespace(needed=needed, fits=lambda gib: needed <= gib * GIB)

    monkeypatch.setattr("leanlift.training.by_card.plan_of", plan_of)
    steps = planned.ladder("tiny", KNOWN["Llama-2-7B"], 2.5)
    assert [s.plan.needed / GIB for s in steps] == [5.0, 4.0, 3.0, 2.0], "what saves is kept"
    assert [s.added is None for s in steps] == [True, False, False, False]
    assert planned.first_that_fits(steps, 8.0) == (
        "5.00 GiB with the command's defaults", {"changed": {}, "needed": 5 * GIB},
    )  # fmt: skip
    text, facts = planned.first_that_fits(steps, 3.5)
    assert text.startswith("3.00 GiB with ")
    assert facts["changed"] == steps[2].keys
    assert set(steps[1].keys) < set(steps[2].keys)
    assert planned.first_that_fits(steps, 1.0)[0] == "no: 2.00 GiB at least"


@pytest.mark.thorough
def test_what_fits_is_with_as_few_changes_as_do(tmp_path: Path) -> None:
    shape = json.loads((KNOWN["Llama-3-8B"] / "config.json").read_text())
    small = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps({**shape, "num_hidden_layers": 2, **small}))
    plenty = planned.fitting([8.0], {"tiny": base}).facts["8"]["tiny"]
    assert plenty["changed"] == {}
    least = (plenty["needed"] - 1) / GIB
    found = planned.fitting([0.1, least, 8.0], {"tiny": base})
    assert found.facts["8"]["tiny"] == plenty
    assert found.facts[f"{least:g}"]["tiny"]["changed"]
    assert found.facts["0.1"]["tiny"]["changed"] is None
    assert next(text for label, text in found.lines if label).startswith("no: ")


def test_the_known_models_have_shapes() -> None:
    assert len(KNOWN) == 5
    for place in KNOWN.values():
        assert json.loads((place / "config.json").read_text())["num_hidden_layers"] >= 28


def test_a_card_that_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    assert "expected card as one of RTX 3060" in complaint(capsys, "doctor", "--card", "rtx1")
