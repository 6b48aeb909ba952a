"""The time of a training step by class of kernel: modelled from shapes, beside a card's profile.

    python -m benchmarks.step_model

Llama-2-7B, 1 x 2048 tokens, 5 %, activation checkpointing, NF4 with double quantization, bf16
values, 8-bit moments. FLOP and bytes are those that `leanlift plan --card` counts
(`leanlift/plan/work.py`), taken apart by class; that they add up to its time is checked. QLoRA of r
= 64 on every Linear beside it, with adapters in bf16: the same products with the frozen weights and
the same bytes between them, weights dequantized thrice and not patched, and the adapters' own
products and bytes; with fused kernels what is between products is touched less often, in both.
`by strips`: gradients of values for the share of a block that `benchmarks/mask_tiles` found real
masks to need, and copies of both factors. No line has the host's time. `measured` are the kernels
of a profile on that card, where `benchmarks/gpu_proof` has left one; an earlier one has all
products in one class.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, read_rows, write_rows
from benchmarks.plan import MODELS, STEP
from leanlift import LiftConfig, PlanSettings
from leanlift.plan.base import FakeBase, without_packing_search
from leanlift.plan.cards import Card, card_named
from leanlift.plan.fake import fake_tensors
from leanlift.plan.planner import running_of
from leanlift.plan.shapes import shapes_of
from leanlift.plan.time import ATTENTION, PRODUCTS, TRAFFIC, step_time
from leanlift.plan.work import (
    ATTENTION_BACK,
    LOGIT_TOUCHES,
    ModelWork,
    Part,
    Running,
    made_nbytes,
    picked_nbytes,
    product_flop,
    recomputed_in,
    step_work,
    touched_nbytes,
)

MODEL, RANK = "Llama-2-7B", 64
CARDS = ("RTX 4090", "H100 SXM")
PROFILE = RESULTS / "gpu_proof-nvidia-h100-80gb-hbm3.csv"
EARLIER = {"comfortable": {"elementwise": "elementwise and reductions"}}
"""What classes were called in a profile under a setting's earlier name."""

MEASURED = {"leanlift": ("default", "comfortable"), "QLoRA, r = 64": ("QLoRA r=64",)}
"""Under which names a profile may have a line of this table."""

STRIPS = {"rank": "8", "density": "0.05", "tile": "strips"}
"""The masks of `mask_tiles` that are like those of 64 and 5 % at this width."""

Classes = dict[str, Part]


def ours(model: ModelWork, run: Running) -> Classes:
    """A step of leanlift by class; its parts add up to `step_work`'s."""
    work, found = step_work(model, run), _shared(model, run)
    recomputed = recomputed_in(model, run)
    made = 0.0
    for place, matrix in enumerate(model.matrices):
        again = place in recomputed
        made += made_nbytes(matrix, run) * (1 + again)
        made += made_nbytes(matrix, run, is_there=again and run.reuses)
    trained = [matrix for matrix in model.matrices if matrix.entries]
    found["dequantize and patch"] = Part(traffic=made)
    found["gradients of values"] = Part(products=sum(product_flop(m, run) for m in trained))
    found["gather"] = Part(traffic=sum(picked_nbytes(m, run) for m in trained))
    found["optimizer"] = work.optimizer
    return found


def qlora(model: ModelWork, run: Running) -> Classes:
    """A step of QLoRA by class: per matrix A [r, n] and B [m, r] in bf16, their moments in fp32."""
    plain = replace(
        model, matrices=tuple(replace(m, entries=0) for m in model.matrices)
    )  # nothing is patched
    run = replace(run, reuses=False)
    found = ours(plain, run)
    recomputed, tokens = recomputed_in(model, run), run.rows * run.tokens
    flop = traffic = 0.0
    for place, matrix in enumerate(model.matrices):
        small = 2 * tokens * RANK * (matrix.m + matrix.n)
        passes = 1 + (place in recomputed)
        flop += small * (passes + 2)  # inputs' gradients, and those of A and B
        # x is read again, what is added to y is written, read and added; backward twice that
        traffic += tokens * (matrix.n + 3 * matrix.m) * run.item * (passes + 2)
    parameters = RANK * sum(matrix.m + matrix.n for matrix in model.matrices)
    found["products"] += Part(products=flop)
    found["elementwise"] += Part(traffic=traffic)
    found["optimizer"] = Part(traffic=parameters * (3 * run.item + 2 * 8))
    return found


def by_strips(classes: Classes, model: ModelWork, run: Running, share: float) -> Classes:
    """The same where of the values' gradients a share of each matrix is formed."""
    trained = [matrix for matrix in model.matrices if matrix.entries]
    tokens = run.rows * run.tokens
    copies = sum(2 * tokens * (matrix.m + matrix.n) * run.item for matrix in trained)
    unformed = sum(2 * matrix.m * matrix.n * run.item for matrix in trained)
    gather = classes["gather"].traffic - (1 - share) * unformed + copies
    products = share * classes["gradients of values"].products
    return {**classes, "gradients of values": Part(products), "gather": Part(traffic=gather)}


def share_by_strips() -> float:
    """Of a block, what is formed by strips, in whole groups of rows."""
    rows = [row for row in read_rows(RESULTS / "mask_tiles.csv") if STRIPS.items() <= row.items()]
    areas = [math.prod(map(int, row["shape"].split("x"))) for row in rows]
    formed = (float(row["formed"]) * area for row, area in zip(rows, areas, strict=True))
    return sum(formed) / sum(areas)


def _shared(model: ModelWork, run: Running) -> Classes:
    """What every method has: products with frozen weights, what is between them, the loss."""
    work, recomputed = step_work(model, run), recomputed_in(model, run)
    products = touched = 0.0
    for place, matrix in enumerate(model.matrices):
        passes = 2 + (place in recomputed)
        products += passes * product_flop(matrix, run)
        touched += (passes + 1) * touched_nbytes(matrix, run)
    attention = work.forward.attention + work.recomputed.attention + work.backward.attention
    assert math.isclose(work.backward.attention, ATTENTION_BACK * work.forward.attention)
    logits = LOGIT_TOUCHES * 4 * run.trained * model.head[0]
    head = Part(traffic=work.loss.traffic - logits)
    return {
        "products": Part(products=products + work.loss.products) + head,
        "gradients of values": Part(),
        "attention": Part(attention=attention),
        "elementwise": Part(traffic=touched + logits),
        "dequantize and patch": Part(),
        "gather": Part(),
        "optimizer": Part(),
    }


def seconds(part: Part, card: Card) -> float:
    """As `leanlift plan` makes seconds of FLOP and bytes."""
    products = part.products / PRODUCTS + part.attention / ATTENTION
    return products / card.flops + part.traffic / (TRAFFIC * card.bandwidth)


def counted(model: Any = None, **changes: Any) -> tuple[ModelWork, Running]:
    """The work of a step of a model under settings.

    Args:
        model: its configuration; None: that of `MODEL`.
        changes: of `PlanSettings`.
    """
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "config.json"
        model = MODELS[MODEL] if model is None else model
        path.write_text(json.dumps(model.to_dict()), encoding="utf-8")
        config = LiftConfig(density=0.05, values_dtype="bfloat16")
        planned = FakeBase.of(path).planned(config, PlanSettings(**{**STEP, **changes}))
        with without_packing_search(), fake_tensors():
            shapes = shapes_of(planned)
    return shapes.work, running_of(planned, shapes)


def measured(line: str, kinds: Iterable[str], profile: Path = PROFILE) -> dict[str, float]:
    """Milliseconds by class of a line in the profile on an H100; nothing where it has none.

    Args:
        line: of this table.
        kinds: the classes.
        profile: the proof's rows.
    """
    rows = {row["what"]: row["value"] for row in read_rows(profile)}
    for name in MEASURED[line]:
        found = {
            kind: rows.get(f"{name}, {EARLIER.get(name, {}).get(kind, kind)}, ms") for kind in kinds
        }
        if any(found.values()):
            return {kind: float(value) for kind, value in found.items() if value is not None}
    return {}


def main() -> None:
    blocks = MODELS[MODEL].num_hidden_layers
    settings: dict[str, dict[str, Any]] = {
        "leanlift": {},
        "leanlift, weights reused": {"reuse_weights": True},
        "leanlift, half the blocks kept": {"kept_blocks": blocks // 2},
        "leanlift, fused kernels": {"fused_elementwise": True},
        "leanlift, all of these": {
            "kept_blocks": blocks // 2,
            "reuse_weights": True,
            "fused_elementwise": True,
        },
    }
    share = share_by_strips()
    rows = []
    for name in CARDS:
        card, lines = card_named(name), dict[str, Classes]()
        for setting, changes in settings.items():
            model, run = counted(**changes)
            lines[setting] = ours(model, run)
            time = step_time(step_work(model, run), card).seconds
            assert math.isclose(sum(seconds(p, card) for p in lines[setting].values()), time)
            if setting in ("leanlift", "leanlift, all of these"):
                lines[f"{setting}, by strips"] = by_strips(lines[setting], model, run, share)
        lines["QLoRA, r = 64"] = qlora(*counted())
        lines["QLoRA, r = 64, fused kernels"] = qlora(*counted(fused_elementwise=True))
        for line, classes in lines.items():
            cells = {kind: round(1e3 * seconds(part, card), 1) for kind, part in classes.items()}
            whole = round(sum(1e3 * seconds(part, card) for part in classes.values()), 1)
            rows.append({"card": name, "line": line, "how": "modelled", "ms": whole, **cells})
    for line in MEASURED:
        found = measured(line, kinds := [*lines["leanlift"]])
        if found:
            whole = round(sum(found.values()), 1)
            cells = {kind: found.get(kind, "") for kind in kinds}
            rows.append({"card": CARDS[1], "line": line, "how": "measured", "ms": whole, **cells})
    for row in rows:
        print(row)
    print(f"Wrote {write_rows('step_model', rows)}")


if __name__ == "__main__":
    main()
