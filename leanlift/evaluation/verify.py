"""Does a merged checkpoint compute what base and adapter do? Asked of stock transformers.

The reference is made without the merge's own code: for `onto="original"` the base is loaded by
transformers and the offsets are added to its modules; for `onto="quantized"` the base is loaded as
it was for training and the adapter is attached. Both answer prompts of the training data, and so
does the merged checkpoint, loaded as any user would load it. What differs then is rounding: the
weights to the output's dtype, and each operation to the dtype in which it is computed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import AutoConfig

from leanlift.adapters import RUN_NAME, Adapter, open_adapter
from leanlift.data.dataset import load_rows, tokenized
from leanlift.data.ready import has_images
from leanlift.data.tokenizer import load_tokenizer, vocabulary_rows
from leanlift.data.tokens import Tokenization
from leanlift.errors import UserError
from leanlift.export import MergeReport
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.tensors import read_json
from leanlift.model import grow_embedding, load_adapter, scale_adapter
from leanlift.model.stacks import named_parts
from leanlift.plan.auto import auto_class_with
from leanlift.rows.images import COLUMNS, text_alone
from leanlift.tiles import row_ranges, tile_rows
from leanlift.training.experts import load_with_experts_as_stored
from leanlift.training.load import load_as_trained
from leanlift.weights.kinds import matrix_of
from leanlift.weights.quantized import dtype_of

BOUNDS = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 1e-1}
"""The largest difference of a logit that rounding may make, as a share of the largest logit. The
coarser of the two dtypes (of the weights written, of the trained model's computation) counts."""

TOKENS = 128
PROMPTS = 4

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        difference: the largest difference of a logit between merged and reference.
        largest: the largest logit of the reference.
        effect: the largest change that the adapter itself makes to a logit of the base.
        bound: what `difference` may be.
        prompts: how many were tried.
    """

    difference: float
    largest: float
    effect: float
    bound: float
    prompts: int

    def __str__(self) -> str:
        return (
            f"logits differ by {self.difference:.3g} at most on {self.prompts} prompts (bound "
            f"{self.bound:.3g}; the largest logit is {self.largest:.3g}, and the adapter itself "
            f"changes them by up to {self.effect:.3g})"
        )


def check_verifiable(adapter: str | Path, data: str | None = None, base: str | None = None) -> None:
    """Refuse before a merge what could not be verified after it; the arguments are those of
    `verify_merged`, and the base that is merged onto, where it is not the adapter's own.

    Raises:
        UserError: no rows to take prompts from, or a head that is not over a vocabulary.
    """
    with open_adapter(adapter, base=base) as opened:
        if opened.task is not None:
            raise UserError(
                f"{opened.directory} is an adapter of a {opened.task.architecture}: --verify "
                "compares logits of language models alone; leave it out."
            )
        rows_to_ask(opened, data)


def verify_merged(
    adapter: str | Path, merged: MergeReport, data: str | None = None
) -> Verification:
    """Compare a merged checkpoint with base + adapter.

    Args:
        adapter: what was merged.
        merged: what `merge_adapter` returned.
        data: rows to take prompts from; by default those that the run was trained on.

    Raises:
        UserError: no prompts, or the logits differ by more than rounding explains.
    """
    with open_adapter(adapter, base=merged.base) as opened:
        prompts = _prompts(opened, merged.output, data)
        with torch.no_grad():
            before, reference = ask_both(opened, merged, lambda model: _logits(model, prompts))
            found = _logits(_load(merged.output, merged.dtype, opened), prompts)
        coarser = [merged.dtype] + [opened.base.dtype] * (merged.onto == "quantized")
    largest = max(float(logits.abs().max()) for logits in reference)
    result = Verification(
        difference=_difference(found, reference),
        largest=largest,
        effect=_difference(before, reference),
        bound=max(BOUNDS[dtype] for dtype in coarser) * largest,
        prompts=len(prompts),
    )
    if not result.difference <= result.bound:  # a NaN is no pass
        raise UserError(
            f"{merged.output} is not what {adapter} and its base compute: {result}. The directory "
            "is kept for inspection; do not serve it."
        )
    return result


def _prompts(adapter: Adapter, merged: str, data: str | None) -> list[Tensor]:
    """Token ids [1, T] of the first examples that the adapter was trained on, cut to `TOKENS`."""
    rows, facts = rows_to_ask(adapter, data)
    how = Tokenization.as_trained(load_tokenizer(merged), facts, vocabulary_rows(merged))
    if has_images(rows):  # what an image becomes is the same on both sides: the text is enough
        first = rows.remove_columns([c for c in COLUMNS if c in rows.column_names])
        rows = [text_alone(row) for row in islice(first, PROMPTS)]
    examples = tokenized(rows, how, "first")
    return [torch.tensor([tokens.ids[:TOKENS]]) for _, _, tokens in islice(examples, PROMPTS)]


def rows_to_ask(adapter: Adapter, data: str | None) -> tuple[Any, dict[str, Any]]:
    """The rows to take prompts from, and what the adapter's run was told.

    Raises:
        UserError: nobody says which rows, or they cannot be read.
    """
    run = adapter.directory / RUN_NAME
    facts = read_json(run, MOST_OF_A_STRANGER) if run.is_file() else {}
    facts, split = facts if isinstance(facts, dict) else {}, "train"
    if data is None:
        data, split = _first_rows(facts)
    if not isinstance(data, str) or not data:
        raise UserError(
            f"{adapter.directory} does not say which data it was trained on: name rows to verify "
            "with, --data rows.json."
        )
    return load_rows(data, str(split)), facts


def _first_rows(facts: dict[str, Any]) -> tuple[Any, Any]:
    """The place, and the split, of the first rows that a run was told of."""
    several = facts.get("datasets")
    if isinstance(several, list) and several and isinstance(several[0], dict):
        return several[0].get("path"), several[0].get("split", "train")
    return facts.get("dataset_name"), facts.get("dataset_split", "train")


def ask_both(
    adapter: Adapter, merged: MergeReport, ask: Callable[[Any], Answer]
) -> tuple[Answer, Answer]:
    """What is found of the base, and of the base with the adapter, of which the merge's own code
    has made neither.

    Args:
        adapter: an opened adapter.
        merged: what `merge_adapter` returned.
        ask: is called with one model, then with the other.
    """
    make = _as_trained if merged.onto == "quantized" else _onto_original
    return make(adapter, merged, ask)


def _onto_original(
    adapter: Adapter, merged: MergeReport, ask: Callable[[Any], Answer]
) -> tuple[Answer, Answer]:
    """Of the base, and of the base with the offsets added to its modules."""
    model = _load(merged.base, merged.dtype, adapter)
    if adapter.grown is not None:
        grow_embedding(model, adapter.grown.rows)
    before = ask(model.eval())
    parts: dict[str, Any] = dict(named_parts(model))
    for name, (m, n) in adapter.shapes.items():
        weight, offsets = matrix_of(parts[name]).reshape(m, n), adapter.layer(name)
        for start, stop in row_ranges(m, tile_rows(n, 4)):
            rows = weight[start:stop].to("cpu", torch.float32).contiguous()
            offsets.add_to_(rows, start, stop)
            weight[start:stop] = rows.to(weight.dtype)
    return before, ask(model)


def _as_trained(
    adapter: Adapter, merged: MergeReport, ask: Callable[[Any], Answer]
) -> tuple[Answer, Answer]:
    """Of the quantized base, and of that with the adapter attached."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_as_trained(adapter, merged.base, device)
    load_adapter(model, adapter.directory)
    reference = ask(model.eval())
    scale_adapter(model, 0.0)
    return ask(model), reference


def _load(directory: str, dtype: str, adapter: Adapter) -> Any:
    """A checkpoint as stock transformers loads it; on the GPU where it has room."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    kind = auto_class_with(config, directory, adapter.base.shapes)
    model: Any = load_with_experts_as_stored(
        kind, directory, dtype=dtype_of(dtype), trust_remote_code=False
    )
    needed = sum(parameter.nbytes for parameter in model.parameters())
    if torch.cuda.is_available() and 1.3 * needed < torch.cuda.mem_get_info()[0]:
        model = model.cuda()
    return model


def _logits(model: Any, prompts: list[Tensor]) -> list[Tensor]:
    """fp32 logits [T, V] of each prompt, on the CPU."""
    model.eval()
    device = next(model.parameters()).device
    found = [model(input_ids=ids.to(device)).logits[0].float().cpu() for ids in prompts]
    gc.collect()
    return found


def _difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The largest absolute difference; NaN where either has one."""
    return float(
        torch.stack([(a - b).abs().max() for a, b in zip(ours, theirs, strict=True)]).max()
    )
