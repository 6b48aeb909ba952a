"""The GPU proof's whole path, small, on a CPU."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_proof import Scale, prove

pytest.importorskip("peft")


@pytest.mark.filterwarnings("ignore")  # PEFT's and torch's own, in code that is only compared with
def test_every_section_runs_and_what_is_skipped_is_named() -> None:
    rows = prove(Scale(torch.device("cpu"), small=True))
    assert {row["section"] for row in rows} == {1, 2, 3, 4, 5, 6}
    assert [row["what"] for row in rows if row["holds"] is False] == []
    skipped = [row for row in rows if str(row["value"]).startswith("skipped")]
    assert [row["what"] for row in skipped] == ["Triton kernels, caps and peaks: no CUDA device"]
    assert any(row["what"].startswith("leanlift / SHiRA") for row in rows)
