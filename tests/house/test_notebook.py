"""The notebook runs from its first cell to its last, on the model that it begins with."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
from processes import ENVIRONMENT, ROOT

NOTEBOOK = ROOT / "examples" / "leanlift.ipynb"
CELLS: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_notebook_is_plain_and_has_no_outputs() -> None:
    assert len(CODE) > 6
    assert [cell for cell in CELLS if cell.get("outputs") or cell.get("execution_count")] == []
    install, *others = CODE
    assert 'find_spec("leanlift") is None:\n    %pip install --quiet leanlift' in install
    for text in others:
        ast.parse(text)


@pytest.mark.thorough
def test_the_notebook_runs_in_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is in the extra dev")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is in the extra dev")
    for name, value in {**ENVIRONMENT, "HOME": str(tmp_path), "JUPYTER_PLATFORM_DIRS": "1"}.items():
        monkeypatch.setitem(os.environ, name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    before, after = printed.partition("right before: ")[2].split("\n")[0].split(", after: ")
    assert int(before.rstrip("%")) < 10
    assert int(after.rstrip("%")) > 50
    assert (tmp_path / "merged" / "model.safetensors").is_file()
