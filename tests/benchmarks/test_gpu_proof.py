"""The GPU proof's whole path, small, on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_proof import Scale, prove
from benchmarks.peers import _random_mask

pytest.importorskip("peft")


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore")  # PEFT's and torch's own, in code that is only compared with
def test_every_section_runs_and_what_is_skipped_is_named() -> None:
    rows = prove(Scale(torch.device("cpu"), small=True))
    assert {row["section"] for row in rows} == {1, 2, 3, 4, 5, 6, 7, 8}
    assert [row["what"] for row in rows if row["holds"] is False] == []
    skipped = [row for row in rows if str(row["value"]).startswith("skipped")]
    assert [row["what"] for row in skipped] == ["Triton kernels, caps and peaks: no CUDA device"]
    assert any(row["what"].startswith("leanlift / SHiRA") for row in rows)


def test_a_section_that_comes_too_late_is_a_row() -> None:
    saved: list[int] = []
    scale = Scale(torch.device("cpu"), small=True)
    rows = prove(scale, lambda rows: saved.append(len(rows)), budget=-1.0)
    assert all("not begun" in str(row["value"]) for row in rows)
    assert saved == list(range(1, len(rows) + 1))


@pytest.mark.thorough
def test_a_section_that_fails_is_a_row_and_the_rest_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object) -> list[dict[str, object]]:
        raise KeyError("what a driver may do")

    for name in ("kernels", "lifted", "runs"):
        monkeypatch.setattr(f"benchmarks.gpu_proof.{name}", broken)
    rows = prove(Scale(torch.device("cpu"), small=True))
    failed = [row for row in rows if str(row["value"]).startswith("failed: KeyError")]
    assert {row["section"] for row in failed} == {1, 2, 3, 7}
    assert all(row["holds"] is False for row in failed)
    assert any(row["section"] == 6 and row["holds"] is True for row in rows)


def test_peft_s_masks_are_drawn_where_the_layer_is() -> None:
    mask = _random_mask(torch.nn.Linear(48, 32), 3)
    assert mask.shape == (32, 48)
    assert mask.sum() == 3 * (32 + 48)
    assert set(mask.unique().tolist()) == {0.0, 1.0}
