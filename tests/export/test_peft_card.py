"""What the card of a form of PEFT's says is so, and what stock tools do with it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sweeps import swept
from tiny import FORMATS, load
from trained import logits, trained
from transformers import AutoModelForCausalLM

from leanlift import export_peft, merge_adapter
from leanlift.adapters import FORMS
from leanlift.export import card_peft

pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # PEFT's own

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "peft_forms.csv"


def test_the_figures_are_those_of_the_benchmark() -> None:
    with RESULT.open(encoding="utf-8") as file:
        rows = {r["model"]: r for r in csv.DictReader(file) if int(r["steps"]) == card_peft.STEPS}
    for model, said in card_peft.TAUGHT.items():
        assert said == round(float(rows[model]["loss_of_answers"]), 2)
    for key, said in card_peft.APART.items():
        assert said == round(float(rows["shira over 16 bits"][key]), 1)
    merged = rows["shira over nf4, merged by peft"]
    assert round(float(merged["change_made"]), 2) == card_peft.CHANGE_MADE
    for key in ("largest_difference", "divergence", "loss_of_answers"):
        assert rows["shira over nf4"][key] == rows["trained"][key]
        assert rows["super-tuning over 16 bits"][key] == rows["shira over 16 bits"][key]


@pytest.mark.parametrize("kind", swept(FORMATS, "nf4"))
@pytest.mark.parametrize("form", FORMS)
def test_what_the_card_says_to_run_is_the_trained_model(
    base: Path, tmp_path: Path, form: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(base, tmp_path / "adapter", kind)
    export_peft(tmp_path / "adapter", tmp_path / "exported", False, form=form)
    card = (tmp_path / "exported" / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").symlink_to(base)
    found: dict[str, object] = {}
    exec(compile(code[0], "card", "exec"), found)
    apart = (logits(found["model"]) - logits(model)).abs().max()
    holds = kind == "dense" or FORMS[form].holds_quantized
    assert (apart <= 1e-5 * logits(model).abs().max()) == holds
    said = " ".join(card.split())
    assert ("is the model that was trained over a base in that format alone" in said) == (
        holds and kind != "dense"
    )
    assert ("the model that was trained is not" in said) == (not holds)
    assert ("added to other weights" in said) == (kind == "dense")
    assert f"It was trained over {'float32' if kind == 'dense' else kind} weights" in said


@pytest.mark.parametrize("form", FORMS)
def test_an_evaluation_by_pretrained_and_peft_is_that_of_the_merge(
    base: Path, tmp_path: Path, form: str
) -> None:
    """What lm_eval does with `--model_args pretrained=…,peft=…`: an Auto class, then PEFT, in eval
    mode. Over NF4, a checkpoint that stock transformers has saved in that format is named."""
    kind = "nf4+double" if FORMS[form].holds_quantized else "dense"
    trained(base, tmp_path / "adapter", kind)
    export_peft(tmp_path / "adapter", tmp_path / "exported", False, form=form)
    load(base, kind).save_pretrained(tmp_path / "pretrained")
    stock = AutoModelForCausalLM.from_pretrained(
        tmp_path / "pretrained", revision="main", dtype=torch.float32
    )
    stock = PeftModel.from_pretrained(stock, tmp_path / "exported", revision="main").eval()
    merge_adapter(tmp_path / "adapter", tmp_path / "merged", dtype="float32", progress=False,
                  onto="quantized")  # fmt: skip
    expected = logits(load(tmp_path / "merged", "dense").eval())
    assert (logits(stock) - expected).abs().max() <= 1e-5 * expected.abs().max()
