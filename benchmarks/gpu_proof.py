"""What leanlift does on a GPU, in parts of a few minutes each; offline, nothing on disk but rows.

    python -m benchmarks.gpu_proof [--part kernels,steps] [--small] [--again] [--budget 420]

machine    versions, and what cannot be imported;
kernels    every kernel against the torch reference and an fp64 truth, its share of the bandwidth;
selection  all matrices of a Llama-2-7B shape in NF4, and the overlap with the exact mask;
steps      training steps at 1 x 2048 with checkpointing, also under a memory cap that emulates a
           smaller card: 20 without creep, planned against measured, kernels by class beside what
           `step_model` says of them, tokens/s, share of the peak FLOPs;
peers      the same step with PEFT's QLoRA (adapters in bf16, as TRL trains them, and in fp32),
           SHiRA and Super-Tuning, each in turn with leanlift, without and with Liger's kernels;
refresh    a refresh, and how fast merged weights leave the device;
settings   steps with INT8 embeddings, and offloaded;
learning   a small model on generated data, whose loss falls the same with torch and Triton;
runs       what a user does: train in every format, resume, evaluate, merge, verify (`gpu_run`);
streaming  blocks that are streamed from the host: the same bits, no creep, times beside the bus's;
           rows eight times as long, offloaded, whole and in pieces.

Prints its rows and writes results/gpu_proof-<gpu>.csv, again after each section: what was measured
is there however the run ends. A section that fails, or that would begin after the budget is spent,
is a row that says why; the next call does those that have no end yet, where code, card and
libraries are the same (`--again`: all of them). A bare machine gets what it lacks from
`benchmarks/wheelhouse.py`. `--small` goes the same way with a tiny model, on a CPU if need be, and
writes nothing.
"""

from __future__ import annotations

import argparse
import importlib
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import card, liger
from benchmarks.common import RESULTS, environment, read_rows, timed, write_rows
from benchmarks.gpu_kernels import Rows, kernels
from benchmarks.gpu_learned import learning, refresh_and_export, selection
from benchmarks.gpu_run import runs
from benchmarks.gpu_steps import by_torch, release, steps
from benchmarks.gpu_streaming import long_rows, streaming
from benchmarks.trainee import Scale, Trainee, lifted

BUDGET = 420.0
"""Seconds after which no section begins: the longest takes about a minute."""

PARTS = (
    "machine", "kernels", "selection", "steps", "peers", "refresh", "settings", "learning", "runs",
    "streaming",
)  # fmt: skip
NEEDED = (
    "triton", "bitsandbytes", "transformers", "peft", "trl", "datasets", "accelerate", "rich",
    "jinja2", "yaml", "liger_kernel",
)  # fmt: skip
"""What the parts import; without the last one rows of it are skipped."""

Done = Mapping[str, Rows]
"""Rows of sections that have ended, by their names."""


def machine() -> Rows:
    """What there is, and whether all can be imported that the parts need."""
    rows: Rows = [{"what": "liger-kernel", "value": liger.version()}]
    if card.present():
        rows.append({"what": "card", "value": card.name()})
        known = card.sheet()
        rows.append({"what": "its sheet", "value": "unknown" if known is None else known.name})
    for name in NEEDED:
        try:
            found = getattr(importlib.import_module(name), "__version__", "there")
        except Exception as error:  # a package that is broken is not there either
            found = f"cannot be imported: {type(error).__name__} {error}"[:160]
        rows.append({"what": name, "value": found})
    return rows


@dataclass(frozen=True)
class Section:
    """A piece of a part that is measured, and written, in one go.

    Attributes:
        part: one of `PARTS`.
        name: within it.
        run: measures.
        shares: whether it takes the model of `Bench.ours`, which is let go of before any other.
    """

    part: str
    name: str
    run: Callable[[], Rows]
    shares: bool = False

    @property
    def key(self) -> str:
        """How it is called in the rows."""
        return self.part if self.name == self.part else f"{self.part}: {self.name}"


class Bench:
    """What sections share: a model with leanlift in it, made when the first one asks for it."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.peak: list[int] = []
        self._ours: Trainee | None = None

    @property
    def ours(self) -> Trainee:
        if self._ours is None:
            build = lambda: lifted(self.scale, "default", "principal", self.peak)  # noqa: E731
            self._ours = Trainee(self.scale, build)
        return self._ours

    def drop(self) -> None:
        self._ours = None
        release()

    def selection(self) -> Rows:
        rows = selection(self.scale, self.ours)
        peaks = [{"what": "peak MiB beyond the model", "value": p // 2**20} for p in self.peak]
        return rows + peaks

    def in_setting(self, setting: str) -> Rows:
        return steps(
            self.scale, setting, Trainee(self.scale, lambda: lifted(self.scale, setting, "random"))
        )

    def beside(self, peer: Any) -> Rows:
        from benchmarks.gpu_peers import beside

        return beside(self.scale, self.ours, peer)


def sections(bench: Bench) -> Iterator[Section]:
    """All there are, in the order of `PARTS`."""
    scale = bench.scale
    device, small = scale.device, scale.small
    yield Section("machine", "machine", machine)
    yield Section("kernels", "kernels", lambda: kernels(device, small))
    yield Section("selection", "selection", bench.selection, True)
    yield Section("steps", "default", lambda: steps(scale, "default", bench.ours), True)
    yield Section("steps", "layers in plain torch", lambda: by_torch(bench.ours), True)
    for peer in _peers():
        yield Section("peers", peer.name, lambda p=peer: bench.beside(p), True)
    yield Section("refresh", "refresh", lambda: refresh_and_export(scale, bench.ours), True)
    for setting in ("int8_embeddings", "offloaded"):
        yield Section("settings", setting, lambda s=setting: bench.in_setting(s))
    yield Section("learning", "learning", lambda: learning(scale))
    yield Section("runs", "runs", lambda: runs(device, small))
    yield Section("streaming", "blocks", lambda: streaming(scale))
    yield Section("streaming", "long rows", lambda: long_rows(scale))


def _peers() -> Sequence[Any]:
    from benchmarks.gpu_peers import PEERS

    return PEERS


class Proof:
    """Sections as they are run, and the rows of all of them.

    Args:
        save: called with all rows so far after each section.
        budget: seconds after which no further section begins.
        done: what has ended before.
    """

    def __init__(self, save: Callable[[Rows], object], budget: float, done: Done) -> None:
        self.found: dict[str, Rows] = dict(done)
        self.save, self.budget = save, budget
        self.started = time.monotonic()

    @property
    def rows(self) -> Rows:
        return [row for rows in self.found.values() for row in rows]

    def run(self, section: Section) -> None:
        """Run one; if it fails, or comes too late, that is its row."""
        spent = time.monotonic() - self.started
        try:
            if spent > self.budget:
                raise TimeoutError(f"not begun after {spent:.0f} s; another call goes on")
            found, took = timed(section.run)
            found.append({"what": ENDED, "value": round(took, 1)})
        except Exception as error:  # whatever it is: the other sections have things to show
            traceback.print_exc()
            found = [{"what": "section", "value": f"failed: {type(error).__name__} {error}"[:200]}]
            found[0]["holds"] = False
        rows = [
            {"section": section.key, "what": "", "value": "", "bar": "", "holds": "", **row}
            for row in found
        ]
        for row in rows:
            print("  ".join(str(value) for value in row.values()), flush=True)
        self.found[section.key] = rows
        self.save(self.rows)


ENDED = "section, s"
"""The last row of a section that has ended well."""


def prove(
    scale: Scale,
    save: Callable[[Rows], object] = lambda rows: None,
    budget: float = BUDGET,
    parts: Sequence[str] = PARTS,
    done: Done | None = None,
) -> Rows:
    """All sections of some parts that have not ended yet; what cannot run is a row that says why.

    Args:
        scale: how large.
        save: called with all rows so far after each section.
        budget: seconds after which no further section begins.
        parts: of `PARTS`.
        done: rows of sections that have ended, which come first.
    """
    proof, bench = Proof(save, budget, done or {}), Bench(scale)
    for section in sections(bench):
        if section.part not in parts or section.key in (done or {}):
            continue
        if not section.shares:
            bench.drop()
        proof.run(section)
        release()
    bench.drop()
    return proof.rows


def ended(path: Path, here: Mapping[str, str]) -> dict[str, Rows]:
    """Rows of the sections in a file that have ended, where they were measured on the same machine
    with the same code and libraries; else nothing.

    Args:
        path: of an earlier call, whether it is there or not.
        here: what `environment` says now.
    """
    found: dict[str, Rows] = {}
    for row in read_rows(path):
        if any(row.get(name) != value for name, value in here.items()):
            return {}
        own = {name: value for name, value in row.items() if name not in here}
        found.setdefault(str(own["section"]), []).append(own)
    return {key: rows for key, rows in found.items() if rows[-1]["what"] == ENDED}


def _chosen(text: str) -> tuple[str, ...]:
    parts = tuple(text.split(","))
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PARTS)}; got {unknown[0]!r}")
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model; writes nothing")
    parser.add_argument("--part", type=_chosen, default=PARTS, help=f"some of {','.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="also what has ended before")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="seconds after which nothing begins"
    )
    arguments = parser.parse_args()
    cuda = card.present()
    if not cuda and not arguments.small:
        parser.error("expected a CUDA device; --small goes the same way on a CPU")
    torch.manual_seed(0)
    scale = Scale(torch.device("cuda", 0) if cuda else torch.device("cpu"), arguments.small)
    file = f"gpu_proof-{card.name().replace(' ', '-').lower()}" if cuda else "gpu_proof-cpu"
    done = {} if arguments.small else ended(RESULTS / f"{file}.csv", environment())
    if arguments.again:  # of other parts it is kept
        done = {key: rows for key, rows in done.items() if _part_of(key) not in arguments.part}

    def save(rows: Rows) -> object:
        return None if arguments.small else write_rows(file, rows)

    rows, took = timed(lambda: prove(scale, save, arguments.budget, arguments.part, done))
    missed = [row["what"] for row in rows if str(row["holds"]) == "False"]
    print(f"{took:.0f} s. Bars missed: {', '.join(missed) or 'none'}.")
    if not arguments.small:
        print(f"Wrote {save(rows)}")


def _part_of(key: str) -> str:
    return key.partition(":")[0]


if __name__ == "__main__":
    main()
