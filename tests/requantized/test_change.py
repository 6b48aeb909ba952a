"""How many changed weights keep their change, by hand, and in a bitsandbytes checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
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
