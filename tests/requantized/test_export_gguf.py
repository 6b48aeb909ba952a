"""From an adapter to a GGUF file and a bitsandbytes checkpoint: what is written, what is said."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from command import complaint
from grown import ROWS as GROWN_ROWS
from grown import grown, make_tokens
from stand_ins import make_llama_cpp
from tiny import load, make_checkpoint
from trained import dense_offsets, trained
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from leanlift import UserError, merge_adapter, save_adapter
from leanlift.cli import main
from leanlift.demo.run import BASE
from leanlift.demo.skills import make_rows
from leanlift.requantized.gguf import write_gguf
from leanlift.requantized.tools import Tools, find_tools, has_runtime
from leanlift.requantized.wanted import Wanted

pytest.importorskip("gguf", reason="pip install gguf")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a script")


def is_installed() -> bool:
    """Whether llama.cpp's own converter can run here."""
    try:
        find_tools("Q8_0")
    except UserError:
        return False
    return find_spec("sentencepiece") is not None


ROWS = [{"prompt": f"{i} plus {i} is ", "completion": str(2 * i)} for i in range(6)]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("requantized")
    base = make_checkpoint(place / "base", dtype=torch.float16)
    trained(base, place / "adapter", "nf4", density=0.1)
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return place / "adapter"


def quiet(adapter: Path, **more: object) -> Wanted:
    rows = str(adapter.with_name("rows.jsonl"))
    return replace(Wanted(adapter, data=rows, progress=False), **more)  # type: ignore[arg-type]


@pytest.mark.thorough
def test_a_quantized_file_and_what_is_left_in_it(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = make_llama_cpp(tmp_path / "llama.cpp")
    argv = ["export", str(adapter), str(tmp_path / "small"), "--format", "gguf"]
    argv += ["--quantize", "q4_0", "--llama_cpp", str(tools)]
    main([*argv, "--data", str(adapter.with_name("rows.jsonl"))])
    said = capsys.readouterr().out
    out = tmp_path / "small"
    names = {file.name for file in out.iterdir()}
    assert names == {"small-Q4_0.gguf", "Modelfile", "README.md"}
    assert (out / "Modelfile").read_text().startswith("FROM ./small-Q4_0.gguf\nTEMPLATE")
    assert "matrices: 15 in Q4_0; 14 matrices of" in said
    assert f"{tools}/build/bin/llama-quantize quantized them" in said
    assert f"on 6 rows of {adapter.with_name('rows.jsonl')} (" in said
    assert "; base in Q4_0 " in said
    changed = sum(int((d != 0).sum()) for d in dense_offsets(adapter).values())
    shown = int(
        said.partition("% of ")[2].partition("of ")[2].partition(" changed")[0].replace(",", "")
    )
    assert 0.99 * changed <= shown <= changed  # a few are too small for fp16
    assert "changed weights keep at least half" in (out / "README.md").read_text()
    assert "library_name: gguf" in (out / "README.md").read_text()
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.thorough
def test_a_file_that_is_not_quantized_is_the_merge(adapter: Path, tmp_path: Path) -> None:
    tools = make_llama_cpp(tmp_path / "llama.cpp")
    done = write_gguf(quiet(adapter), tmp_path / "out", "F32", tools)
    assert done.comparison is not None
    assert done.comparison.kept == pytest.approx(1, abs=1e-3)
    assert done.comparison.change is None
    assert done.comparison.equal == done.comparison.answers == 6
    read = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out",
        gguf_file=done.file,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    merge_adapter(adapter, tmp_path / "merged", dtype="float32", progress=False)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    for name, tensor in merged.state_dict().items():
        assert torch.equal(tensor, read.state_dict()[name]), name


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("unknown", "llama.cpp's converter failed: ERROR: Model LlamaForCausalLM is not supported"),
        pytest.param(
            "norms",
            "the 16-bit file is not what adapter and base compute: logits differ",
            marks=pytest.mark.thorough,
        ),
    ],
    ids=["refused", "another model"],
)
def test_a_file_that_is_another_model_is_not_left(
    adapter: Path, tmp_path: Path, fault: str, said: str
) -> None:
    tools = make_llama_cpp(tmp_path / "llama.cpp", fault)
    with pytest.raises(UserError, match=said):
        write_gguf(quiet(adapter), tmp_path / "out", "F16", tools)
    assert [path.name for path in tmp_path.iterdir()] == ["llama.cpp"]


def test_more_tokens_than_the_base_has_are_tried_before_anything_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(grown(load(make_checkpoint(tmp_path / "base"))), tmp_path / "adapter")
    make_tokens().save_pretrained(tmp_path / "adapter")
    tried = []

    def try_vocabulary(_: Tools, checkpoint: Path, file: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        tried.append((config["vocab_size"], len(AutoTokenizer.from_pretrained(checkpoint))))
        raise UserError("unknown")

    monkeypatch.setattr(Tools, "try_vocabulary", try_vocabulary)
    monkeypatch.setattr("leanlift.requantized.gguf.merge", None)
    tools = make_llama_cpp(tmp_path / "llama.cpp")
    with pytest.raises(UserError, match="unknown"):
        write_gguf(
            quiet(tmp_path / "adapter", data=None, verify=False), tmp_path / "out", "F16", tools
        )
    assert tried == [(GROWN_ROWS, GROWN_ROWS)]


@pytest.mark.thorough
def test_without_a_comparison(adapter: Path, tmp_path: Path) -> None:
    tools = make_llama_cpp(tmp_path / "llama.cpp", "norms")
    wanted = quiet(adapter, verify=False, data=None)
    done = write_gguf(wanted, tmp_path / "out", "Q8_0", tools)
    assert done.comparison is None
    assert done.types == {"Q8_0": 15}
    with pytest.raises(UserError, match=r"--data rows.json; or leave .* out with --no_verify"):
        write_gguf(replace(wanted, verify=True), tmp_path / "other", "Q8_0", tools)


@pytest.mark.thorough
@pytest.mark.skipif(not is_installed(), reason="needs llama.cpp's converter: leanlift[gguf]")
def test_the_built_in_model_by_llama_cpp_itself(tmp_path: Path) -> None:
    trained(BASE, tmp_path / "adapter", "nf4", density=0.05)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps(row) + "\n" for row in make_rows("next", 8, split="heldout"))
    )
    kind = "Q4_K_M" if has_runtime() else "Q8_0"
    wanted = Wanted(tmp_path / "adapter", data=str(rows), progress=False)
    done = write_gguf(wanted, tmp_path / "out", kind)
    assert done.comparison is not None
    assert done.comparison.same.tokens is (True if has_runtime() else None)
    assert done.comparison.same.difference < done.comparison.same.effect / 20
    assert done.comparison.change is not None
    assert done.comparison.change.share > 0.8


def test_options_that_belong_elsewhere(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["export", str(adapter), str(tmp_path / "out")]
    said = complaint(capsys, *argv, "--quantize", "Q4_0")
    assert "--quantize cannot go with --format merged: --quantize belongs to gguf" in said
    said = complaint(capsys, *argv, "--format", "gguf", "--max_shard_size", "1GB")
    assert (
        "--max_shard_size belongs to merged, bnb-nf4, bnb-int8, ct-fp8, ct-w8a16, ct-w4a16" in said
    )
    said = complaint(capsys, *argv, "--format", "gguf", "--quantize", "Q4")
    assert "or none, got 'Q4'" in said
