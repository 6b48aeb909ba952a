"""No code of a stranger's runs unless a user says so."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
from tiny import load, make_checkpoint, make_tokenizer

import leanlift
from leanlift import (
    LiftConfig,
    UserError,
    get_lift_model,
    load_adapter,
    merge_adapter,
    save_adapter,
)
from leanlift.evaluation.verify import verify_merged

SOURCE = Path(leanlift.__file__).parent
OWN_FILES = {"demo"}
"""Rooms that load nothing but what they have made."""


def calls(file: Path) -> list[ast.Call]:
    """Calls of `AutoSomething.from_pretrained` in a source file."""
    return [
        node
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id.startswith("Auto")
    ]


def test_whether_code_is_trusted_is_said_at_every_load() -> None:
    """transformers' default is to ask whoever sits at the terminal."""
    found = 0
    for file in SOURCE.rglob("*.py"):
        if file.relative_to(SOURCE).parts[0] in OWN_FILES:
            continue
        for call in calls(file):
            found += 1
            said = [keyword.arg for keyword in call.keywords]
            assert "trust_remote_code" in said, f"{file}:{call.lineno}"
    assert found >= 5


CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast
class Evil(PreTrainedTokenizerFast): pass
"""


def test_the_code_of_an_adapters_tokenizer_never_runs(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "base")
    adapter, mark = tmp_path / "adapter", tmp_path / "executed"
    model = get_lift_model(load(base, "nf4"), LiftConfig(approx_rank=8), progress=False)
    save_adapter(model, adapter)
    make_tokenizer().save_pretrained(adapter)
    (adapter / "evil.py").write_text(CODE.format(mark=str(mark)))
    config = adapter / "tokenizer_config.json"
    data: dict[str, Any] = json.loads(config.read_text())
    data["tokenizer_class"] = "Evil"
    data["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    config.write_text(json.dumps(data))
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 4))
    report = merge_adapter(adapter, tmp_path / "merged", dtype="float32", progress=False)
    verify_merged(adapter, report, str(rows))
    load_adapter(load(base, "nf4"), adapter)
    assert not (tmp_path / "merged" / "evil.py").exists()
    assert not mark.exists()
    merged = tmp_path / "merged" / "tokenizer_config.json"
    merged.write_text(json.dumps(data))  # as if the base itself had asked for it
    (tmp_path / "merged" / "evil.py").write_text(CODE.format(mark=str(mark)))
    with pytest.raises((UserError, ValueError)):
        verify_merged(adapter, report, str(rows))
    assert not mark.exists()
