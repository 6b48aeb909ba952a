"""The GPU proof's whole path, small, on a CPU: as one without a card goes it, and with a card that
is made up, so that what only a GPU is asked for is run too."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import card, common
from benchmarks.card import Span
from benchmarks.gpu_profile import CLASSES, GRADIENTS
from benchmarks.gpu_proof import ENDED, PARTS, _chosen, ended, prove
from benchmarks.trainee import Scale

pytest.importorskip("peft")
quiet = pytest.mark.filterwarnings(
    "ignore"
)  # PEFT's and torch's own, in code that is compared with

KERNELS = [
    Span("nvjet_tst_128x256", 0, 100),
    Span("flash_fwd_kernel<cutlass::bfloat16_t>", 100, 110),
    Span(GRADIENTS, 200, 260, is_mark=True),
    Span("nvjet_tst_256x128", 200, 240),
    Span("gather_kernel", 240, 260),
]


@pytest.fixture
def made_up_card(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """An H100 with answers to all that is asked of one; how often each was asked."""
    asked: dict[str, int] = {}

    def answers(name: str, answer: Callable[..., Any]) -> None:
        def counted(*arguments: Any) -> Any:
            asked[name] = asked.get(name, 0) + 1
            return answer(*arguments)

        monkeypatch.setattr(card, name, counted)

    def ran(run: Callable[[], Any], answer: Any) -> Any:
        run()
        return answer

    answers("present", lambda: True)
    answers("name", lambda: "NVIDIA H100 80GB HBM3")
    for name in ("synchronize", "reset_peaks", "release"):
        answers(name, lambda: None)
    for name in ("allocated", "pinned"):
        answers(name, lambda: 2**20)
    for name in ("peak", "reserved_peak"):
        answers(name, lambda: 2**30)
    answers("cache", lambda: (50 * 2**20, 132))
    answers("capped", lambda gib: nullcontext())
    answers("replayed", lambda run: run)
    answers("waits", lambda run, own: ran(run, []))
    answers("spans", lambda run: ran(run, KERNELS))
    return asked


def small() -> Scale:
    return Scale(torch.device("cpu"), small=True)


def values(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {row["what"]: row["value"] for row in rows}


def bad(rows: list[dict[str, Any]]) -> list[Any]:
    return [(row["what"], row["value"]) for row in rows if row["holds"] is False]


def test_a_step_on_a_card_is_measured_whole(made_up_card: dict[str, int]) -> None:
    rows = prove(small(), parts=("steps",))
    assert bad(rows) == []
    found = values(rows)
    assert found["default, products, ms"] == 0.1
    assert found["default, gradients of values, ms"] == 0.04
    assert found["default, gather, ms"] == 0.02
    modelled = {what for what in found if what.endswith("modelled ms")}
    assert modelled == {f"default, {kind}, modelled ms" for kind in {*CLASSES, GRADIENTS} - {
        "over the bus"}}  # fmt: skip
    assert found["default, the host waits for"] == "nothing"
    assert found["default, cap 7.3 GiB, reserved GiB"] == 1.0
    share = found["default, share of 989.4 TFLOP/s (H100 SXM)"]
    assert 0 <= share < 1
    assert found["default, tokens/s"] > 0
    assert {"capped", "spans", "waits", "reserved_peak"} <= {*made_up_card}


@pytest.mark.thorough
@quiet
@pytest.mark.parametrize("part", [part for part in PARTS if part not in ("steps", "runs")])
def test_every_other_part_runs_on_a_card(part: str, made_up_card: dict[str, int]) -> None:
    rows = prove(small(), parts=(part,))
    assert [entry for entry in bad(rows) if "copy bandwidth" not in entry[0]] == []
    skipped = [row["what"] for row in rows if str(row["value"]).startswith("skipped")]
    assert all(what.endswith("Liger") for what in skipped)


@pytest.mark.thorough
@quiet
def test_every_part_runs_without_a_card() -> None:
    rows = prove(small(), budget=3600.0)
    assert {row["section"].partition(":")[0] for row in rows} == {*PARTS}
    assert bad(rows) == []
    assert any(row["what"].startswith("leanlift / SHiRA") for row in rows)


def test_a_section_that_comes_too_late_is_a_row() -> None:
    saved: list[int] = []
    rows = prove(small(), lambda rows: saved.append(len(rows)), budget=-1.0)
    assert all("not begun" in str(row["value"]) for row in rows)
    assert saved == list(range(1, len(rows) + 1))


def test_a_section_that_fails_is_a_row_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object) -> list[dict[str, object]]:
        raise KeyError("what a driver may do")

    for name in ("kernels", "lifted"):
        monkeypatch.setattr(f"benchmarks.gpu_proof.{name}", broken)
    rows = prove(small(), parts=("machine", "kernels", "selection", "refresh"))
    failed = [row for row in rows if str(row["value"]).startswith("failed: KeyError")]
    assert [row["section"] for row in failed] == ["kernels", "selection", "refresh"]
    assert all(row["holds"] is False for row in failed)
    assert ("machine", ENDED) in {(row["section"], row["what"]) for row in rows}


def test_a_second_call_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    here, path = common.environment(), tmp_path / "proof.csv"

    def save(rows: Any) -> Path:
        return common.write_rows("proof", rows)

    prove(small(), save, budget=-1.0, parts=("machine", "streaming"))
    assert ended(path, here) == {}  # rows that say what has not begun are no end
    prove(small(), save, parts=("machine",), done=ended(path, here))
    before = ended(path, here)
    assert [*before] == ["machine"]
    began: list[str] = []
    monkeypatch.setattr("benchmarks.gpu_proof.machine", lambda: began.append("machine"))
    monkeypatch.setattr("benchmarks.gpu_proof.kernels", lambda *_: began.append("kernels") or [])
    rows = prove(small(), save, parts=("machine", "kernels"), done=before)
    assert began == ["kernels"]
    assert [row["what"] for row in rows if row["section"] == "kernels"] == [ENDED]
    assert [*ended(path, here)] == ["machine", "kernels"]
    assert ended(path, here)["machine"] == before["machine"]
    assert ended(path, {**here, "torch": "another"}) == {}
    assert ended(tmp_path / "absent.csv", here) == {}


def test_parts_are_asked_for_by_name() -> None:
    assert _chosen("kernels,steps") == ("kernels", "steps")
    with pytest.raises(Exception, match=r"expected some of machine,.*got 'step'"):
        _chosen("step")


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA L40S", None),
        ("NVIDIA H200", None),
    ],
)
def test_a_card_s_sheet_is_found_by_the_name_its_driver_has(
    name: str, sheet: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card, "name", lambda: name)
    found = card.sheet()
    assert (None if found is None else found.name) == sheet
