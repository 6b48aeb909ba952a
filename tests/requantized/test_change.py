"""How many changed weights keep their change, by hand, and in a bitsandbytes checkpoint."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from sweeps import swept
from tiny import load, make_checkpoint
from tokenizers import Tokenizer
from trained import trained
from transformers import AutoModelForCausalLM

from leanlift.cli import main
from leanlift.demo.run import BASE
from leanlift.requantized.change import Change
from leanlift.requantized.characters import write_as_pieces


def test_a_change_is_kept_from_half_of_it_on_and_in_its_direction() -> None:
    base = torch.zeros(1, 7)
    merged = torch.tensor([[0.0, 0.2, 0.2, 0.2, -0.2, -0.2, -0.2]])
    held = torch.tensor([[1.0, 0.1, 0.09, 1.0, -0.1, 0.3, 0.0]])
    found = Change()
    found.add(base, merged, base, held)
    assert (found.changed, found.kept, found.total) == (6, 3, 7)
    found.add(base, merged, base + 1, held + 1)
    assert (found.changed, found.kept, found.share) == (12, 6, 0.5)


@pytest.mark.thorough
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_checkpoint_in_few_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    base = make_checkpoint(tmp_path / "base", dtype=torch.float16)
    trained(base, tmp_path / "adapter", "nf4", density=0.1)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "1 plus 1 is ", "completion": "2"}) + "\n")
    argv = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", f"bnb-{kind}"]
    main([*argv, "--data", str(rows)])
    said = capsys.readouterr().out
    assert f"14 matrices in {kind}" in said
    assert "in 16 bits   logits differ by" in said
    main(["export", str(tmp_path / "adapter"), str(tmp_path / "merged")])
    plain = {"nf4": "nf4+double"}.get(kind, kind)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    stock = load(tmp_path / "merged", plain, torch.float16)
    ids = torch.arange(3, 43).reshape(2, 20)
    assert torch.equal(ours(ids).logits, stock(ids).logits)


HALF_A_STEP = {"w4a16": 1 / 15, "w8a16": 1 / 255, "fp8": 16 / 448}
"""Of the largest number of a group, or of a row: integers are evenly spread, and the last binade of
FP8, which ends at 448, has steps of 32."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over a base whose rows are of 128 and 256 numbers, with a row to compare on beside it."""
    place = tmp_path_factory.mktemp("wide")
    base = make_checkpoint(place / "base", dtype=torch.float16, hidden=128, intermediate=256)
    trained(base, place / "adapter", "nf4", density=0.1)
    (place / "rows.jsonl").write_text('{"prompt": "1 plus 1 is ", "completion": "2"}\n')
    return place / "adapter"


@pytest.mark.parametrize("kind", swept(["fp8", "w8a16", "w4a16"], "w4a16"))
def test_a_checkpoint_of_compressed_tensors(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    out, merged = tmp_path / "out", tmp_path / "merged"
    argv = ["export", str(adapter), str(out), "--format", f"ct-{kind}"]
    assert main([*argv, "--data", str(adapter.with_name("rows.jsonl"))]) == 0
    said = capsys.readouterr().out
    assert f"14 matrices in {kind}" in said
    assert f"; base in {kind} " in said
    assert "changed weights keep at least half of their change" in said
    main(["export", str(adapter), str(merged)])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["ignore"]) == ("compressed-tensors", ["lm_head"])
    stored = next(iter(config["config_groups"].values()))["weights"]
    of = AutoModelForCausalLM.from_pretrained
    ids = torch.arange(3, 43).reshape(2, 20)
    ours, stock = of(out), of(merged, dtype=torch.float16)
    assert ours(ids).logits.isfinite().all()
    ours(ids)  # by when the library has unpacked all
    weights = {name: p for name, p in ours.named_parameters() if name.endswith("_proj.weight")}
    plain = dict(stock.named_parameters())
    assert len(weights) == 14
    for name, held in weights.items():
        group = plain[name].float().unflatten(1, (-1, stored.get("group_size") or held.shape[1]))
        largest = group.abs().amax(-1, keepdim=True)
        error = (held.float().view_as(group) - group).abs()
        assert (error <= HALF_A_STEP[kind] * largest + 2**-10 * group.abs()).all(), name
        assert (error > HALF_A_STEP[kind] / 2 * largest).any(), "rounded no finer than said"


def test_rows_that_are_no_groups_are_refused_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(make_checkpoint(tmp_path / "base"), tmp_path / "adapter", "nf4", density=0.1)
    argv = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format"]
    monkeypatch.setattr("leanlift.requantized.checkpoint.merge", None)
    assert main([*argv, "ct-w4a16", "--no_verify"]) == 2
    assert "groups of 128, and model.layers.0.self_attn.q_proj has rows of 64" in (
        capsys.readouterr().err
    )
    monkeypatch.setitem(sys.modules, "compressed_tensors.quantization", None)
    assert main([*argv, "ct-fp8", "--no_verify"]) == 2
    assert 'pip install "leanlift[compressed]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_of_characters_is_written_as_pieces(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BASE / name).read_bytes())
    text = "reverse: hxqzb = bzqxh, next 481 -> 592."
    before = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert write_as_pieces(tmp_path)
    after = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert after.encode(text).ids == before.encode(text).ids
    assert after.decode(after.encode(text).ids) == text
    assert after.get_vocab()["▁"] == before.get_vocab()[" "]
    longer = before.get_vocab() | {"re": len(before.get_vocab())}
    facts = json.loads(before.to_str())
    facts["model"] |= {"vocab": longer, "merges": [["r", "e"]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(facts))
    assert not write_as_pieces(tmp_path)
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == facts
