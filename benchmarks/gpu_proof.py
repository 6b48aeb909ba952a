"""One command that shows what leanlift does on a GPU; within 8 minutes, offline, nothing on disk.

    python -m benchmarks.gpu_proof [--small]

1. every kernel against the torch reference and an fp64 truth, and its share of the bandwidth;
2. selection over all matrices of a Llama-2-7B shape in NF4, and its overlap with the exact mask;
3. training steps at 1 x 2048 with checkpointing in three settings, also under a memory cap that
   emulates a smaller card, 20 steps without creep, planned against measured;
4. the same step with PEFT QLoRA r = 64 and PEFT SHiRA, interleaved, as ratios;
5. a refresh, and how fast merged weights leave the device;
6. a small model on generated data, whose loss falls the same with torch and Triton;
7. what a user does: train in every format, resume, evaluate, merge and verify (`gpu_run`);
8. blocks that are streamed from the host: the same bits, no creep, times beside the bus's; rows
   eight times as long, offloaded, whole and in pieces.

Prints one table and writes results/gpu_proof-<gpu>.csv, again after each section: what was measured
is there however the run ends. A section that fails, or that would begin after the time is over, is
a row that says why. A bare machine gets what it lacks from `benchmarks/wheelhouse.py`.
`--small` goes the same way with a tiny model, on a CPU if need be, and writes nothing.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import timed, write_rows
from benchmarks.gpu_kernels import Rows, kernels
from benchmarks.gpu_run import runs
from benchmarks.gpu_steps import by_torch, peers, release, steps
from benchmarks.gpu_streaming import long_rows, streaming
from benchmarks.trainee import Scale, Trainee, lifted

BUDGET = 420.0
"""Seconds after which no section begins: the longest takes about a minute."""


def selection(scale: Scale, trainee: Trainee) -> Rows:
    """What attaching took, and a sample of masks against exact ones."""
    from leanlift.model import lift_layers, lift_state

    state, layers = lift_state(trainee.model), lift_layers(trainee.model)
    rows: Rows = [
        {"what": f"{len(layers)} matrices, s", "value": round(state.selection_seconds, 2)},
        {"what": "not converged", "value": len(state.unconverged)},
    ]
    for name in ("self_attn.q_proj", "mlp.down_proj"):
        layer = next(layer for n, layer in layers.items() if n.endswith(name))
        share = _overlap(layer, state.config.approx_rank)
        bar = {"bar": ">= 0.999", "holds": share >= 0.999}
        rows.append({"what": f"overlap with the exact mask, {name}", "value": share, **bar})
    return rows


def _overlap(layer: Any, rank: int) -> float:
    """Share of the exact mask, from an fp64 eigendecomposition, that the layer trains."""
    m, n = layer.weight_tiles.shape
    weight = layer.weight_tiles.rows(0, m).double()
    wide = weight if m <= n else weight.T
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    near = vectors @ (vectors.T @ wide)
    near = (near if m <= n else near.T).abs().reshape(-1)
    exact = near.topk(layer.index.count).indices
    return round(float(torch.isin(exact, layer.index.to_flat()).float().mean()), 5)


def refresh_and_export(scale: Scale, trainee: Trainee) -> Rows:
    from leanlift import refresh_mask
    from leanlift.model import lift_layers

    report = refresh_mask(trainee.model, trainee.optimizer)
    sample = list(lift_layers(trainee.model).values())[:7]

    def export() -> int:
        rows = [layer.effective.rows(0, layer.out_features).half().cpu() for layer in sample]
        return sum(row.nbytes for row in rows)

    nbytes, took = timed(export)
    return [
        {"what": "refresh, s", "value": round(report.seconds, 2)},
        {"what": "refresh, churn", "value": round(report.churn, 4)},
        {"what": "merged fp16 weights to the CPU, GB/s", "value": round(nbytes / took / 1e9, 3)},
    ]


def learning(scale: Scale) -> Rows:
    """Losses of a small model on counting sequences, with each implementation."""
    from benchmarks.peers import lift, llama, nf4_llama, tiled_loss, trained
    from leanlift import LiftConfig
    from leanlift.model import use_ops
    from leanlift.optim import SparseAdamW

    names = ["torch", "triton"] if scale.device.type == "cuda" else ["torch"]
    losses: dict[str, list[float]] = {}
    for name in names:
        torch.manual_seed(0)
        model = nf4_llama(llama(256, 2, 64), scale.device, scale.dtype)
        lift(model, LiftConfig(density=0.1, selector="magnitude")).train()
        use_ops(model, name)
        optimizer = SparseAdamW(trained(model), lr=3e-3, ops=name)
        generator, losses[name] = torch.Generator().manual_seed(1), []
        for _ in range(20 if scale.small else 200):
            start = torch.randint(0, 64, (8, 1), generator=generator)
            ids = ((start + torch.arange(32)) % 64).to(scale.device)
            loss = tiled_loss(model, ids)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[name].append(float(loss.detach()))
    rows: Rows = []
    for name, run in losses.items():
        fell = run[-1] < 0.9 * run[0]
        value = f"{run[0]:.4f} -> {run[-1]:.4f}"
        rows.append({"what": f"loss, {name}", "value": value, "bar": "falls", "holds": fell})
    if len(losses) == 2:
        first, second = (torch.tensor(losses[name]) for name in names)
        apart = float((first - second).abs().max() / first[0])
        bar = {"bar": "<= 0.02", "holds": apart <= 0.02}
        rows.append({"what": "largest difference of the losses", "value": apart, **bar})
    return rows


class Sections:
    """Sections as they are run, and the rows of all of them.

    Args:
        save: called with all rows so far after each section.
        budget: seconds after which no further section begins.
    """

    def __init__(self, save: Callable[[Rows], object], budget: float) -> None:
        self.rows: Rows = []
        self.save, self.budget = save, budget
        self.started = time.monotonic()

    def run(self, number: int, section: Callable[[], Rows]) -> None:
        """Run one; if it fails, or comes too late, that is its row."""
        spent = time.monotonic() - self.started
        try:
            if spent > self.budget:
                raise TimeoutError(f"not begun after {spent:.0f} s")
            found, took = timed(section)
            found.append({"what": "section, s", "value": round(took, 1)})
        except Exception as error:  # whatever it is: the other sections have things to show
            traceback.print_exc()
            found = [{"what": "section", "value": f"failed: {type(error).__name__} {error}"[:200]}]
            found[0]["holds"] = False
        for row in found:
            full = {"section": number, "what": "", "value": "", "bar": "", "holds": "", **row}
            self.rows.append(full)
            print("  ".join(str(value) for value in full.values()), flush=True)
        self.save(self.rows)

    def skip(self, number: int, what: str) -> None:
        self.run(number, lambda: [{"what": what, "value": "skipped"}])


def prove(
    scale: Scale, save: Callable[[Rows], object] = lambda rows: None, budget: float = BUDGET
) -> Rows:
    """All sections; one that cannot run is a row that says why.

    Args:
        scale: how large.
        save: called with all rows so far after each section.
        budget: seconds after which no further section begins.
    """
    sections = Sections(save, budget)
    if scale.device.type != "cuda":
        sections.skip(1, "Triton kernels, caps and peaks: no CUDA device")
    sections.run(1, lambda: kernels(scale.device, scale.small))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        for number in range(2, 9):
            sections.skip(number, "bitsandbytes is not installed")
        return sections.rows
    ours: list[Trainee] = []

    def build_and_select() -> Rows:
        peak: list[int] = []
        ours.append(Trainee(scale, lambda: lifted(scale, "default", "principal", peak)))
        rows = selection(scale, ours[0])
        return rows + [{"what": "peak MiB beyond the model", "value": p // 2**20} for p in peak]

    sections.run(2, build_and_select)
    if ours:
        sections.run(3, lambda: steps(scale, "default", ours[0]))
        sections.run(3, lambda: by_torch(ours[0]))
        sections.run(4, lambda: peers(scale, ours[0]))
        sections.run(5, lambda: refresh_and_export(scale, ours[0]))
    ours.clear()
    release()
    sections.run(6, lambda: learning(scale))
    release()
    sections.run(7, lambda: runs(scale.device, scale.small))
    release()
    sections.run(8, lambda: streaming(scale))
    release()
    sections.run(8, lambda: long_rows(scale))
    for setting in ("int8_embeddings", "offloaded"):
        release()
        sections.run(
            3, lambda s=setting: steps(scale, s, Trainee(scale, lambda: lifted(scale, s, "random")))
        )
    return sections.rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="a tiny model; writes nothing")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    if not cuda and not arguments.small:
        parser.error("expected a CUDA device; --small goes the same way on a CPU")
    torch.manual_seed(0)
    scale = Scale(torch.device("cuda", 0) if cuda else torch.device("cpu"), arguments.small)
    name = torch.cuda.get_device_name().replace(" ", "-").lower() if cuda else "cpu"

    def save(rows: Rows) -> object:
        return None if arguments.small else write_rows(f"gpu_proof-{name}", rows)

    rows, took = timed(lambda: prove(scale, save))
    missed = [row["what"] for row in rows if row["holds"] is False]
    print(f"{took:.0f} s. Bars missed: {', '.join(missed) or 'none'}.")
    if not arguments.small:
        print(f"Wrote {save(rows)}")


if __name__ == "__main__":
    main()
