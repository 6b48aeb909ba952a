"""Planned against measured peaks of runs with several of the settings that save memory at once.

    python -m benchmarks.plan_combined [--hidden 512] [--layers 4] [--length 512]

All combinations are too many to run, so each *pair* of settings is: for any two of them there is a
run with both, one with either alone and one with neither, as far as they can be had together. A
plan adds up what each setting does, so what it can get wrong is what two of them do to each other.
Measured as in `plan_peak`: a Llama with random weights, in NF4, three steps, live tensor bytes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Set
from itertools import combinations, product
from typing import Any

import torch

from benchmarks.common import write_rows
from benchmarks.plan_peak import rows_of

SETTINGS: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "kept blocks": {"kept_blocks": 1},
    "reused weights": {"reuse_weights": True},
    "MLPs in pieces": {"tiled_mlp": True, "mlp_tokens": 128},
    "streamed base": {"stream_base": True},
    "streamed state": {"stream_state": True},
    "in backward": {"optim_in_backward": True, "max_grad_norm": 0.0},
    "accumulation": {"gradient_accumulation_steps": 3},
    "INT8 ends": {"quantize_embeddings": True},
    "bf16 values": {"values_dtype": "bfloat16"},
}
NEEDS = {
    "kept blocks": ("checkpointing",),
    "reused weights": ("checkpointing",),
    "streamed state": ("streamed base", "in backward"),
}
"""What a setting cannot be had without."""


def covering_runs(names: tuple[str, ...] = tuple(SETTINGS)) -> list[frozenset[str]]:
    """The settings of each run: few runs, in which any two settings are both on, each on alone and
    both off, where that is possible."""
    every = [
        on
        for chosen in product((False, True), repeat=len(names))
        if _possible(on := frozenset(n for n, yes in zip(names, chosen, strict=True) if yes))
    ]
    missing, runs = {pair for on in every for pair in pairs(on, names)}, []
    while missing:
        best = max(every, key=lambda on: len(missing & set(pairs(on, names))))
        runs.append(best)
        missing -= set(pairs(best, names))
    return runs


def pairs(on: Set[str], names: tuple[str, ...]) -> Iterator[tuple[str, bool, str, bool]]:
    """Each two settings, with whether they are on."""
    for one, other in combinations(names, 2):
        yield one, one in on, other, other in on


def _possible(on: Set[str]) -> bool:
    return all(set(NEEDS.get(name, ())) <= on for name in on)


def settings_of(on: Set[str]) -> dict[str, Any]:
    """As `plan_peak.row` takes them."""
    chosen = [SETTINGS[name] for name in SETTINGS if name in on]
    return {"optim": "sparse_adamw_8bit", **{k: v for each in chosen for k, v in each.items()}}


def _name(on: Set[str]) -> str:
    return ", ".join(name for name in SETTINGS if name in on) or "none"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args(namespace=argparse.Namespace(device="cpu"))
    torch.set_num_threads(1)
    rows = rows_of({_name(on): settings_of(on) for on in covering_runs()}, arguments)
    worst = max(abs(r["planned / measured"] - 1) for r in rows)
    print(f"The plan is off by {worst:.1%} at most, in {len(rows)} runs.")
    print(f"Wrote {write_rows('plan_combined', rows)}")


if __name__ == "__main__":
    main()
