"""README's Python as it is printed, on a tiny base."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from processes import ROOT
from tiny import make_checkpoint, make_tokenizer

README = ROOT / "README.md"


@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    train, use = blocks
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{i} and {i} is ", "completion": str(2 * i)} for i in range(4)]
    names = {"path": str(make_checkpoint(tmp_path / "base")), "rows": rows}
    tokenizer = make_tokenizer()  # a chat model's
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "base")
    exec(train, names)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    exec(use.replace("max_new_tokens=64", "max_new_tokens=2"), names)
