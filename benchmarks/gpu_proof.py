"""One command that shows what leanlift does on a GPU; within 8 minutes, offline, nothing on disk.

    python -m benchmarks.gpu_proof [--small]

1. every kernel against the torch reference and an fp64 truth, and its share of the bandwidth;
2. selection over all matrices of a Llama-2-7B shape in NF4, and its overlap with the exact mask;
3. training steps at 1 x 2048 with checkpointing in three settings, also under a memory cap that
   emulates a smaller card, 20 steps without creep, planned against measured;
4. the same step with PEFT QLoRA r = 64 and PEFT SHiRA, interleaved, as ratios;
5. a refresh, and how fast merged weights leave the device;
6. a small model on generated data, whose loss falls the same with torch and Triton;
7. what a user does: train in every format, resume, evaluate, merge and verify (`gpu_run`).

Prints one table and writes results/gpu_proof-<gpu>.csv, again after each section: what was measured
is there however the run ends. A section that fails, or that would begin after the time is over, is
a row that says why. A bare machine gets what it lacks from `benchmarks/wheelhouse.py`.
`--small` goes the same way with a tiny model, on a CPU if need be, and writes nothing.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch

from benchmarks.common import timed, write_rows
from benchmarks.gpu_kernels import Rows, kernels
from benchmarks.gpu_profile import profiled
from benchmarks.gpu_run import runs
from benchmarks.trainee import GIB, RANK, Scale, Trainee, base, capped, lifted

BUDGET = 420.0
"""Seconds after which no section begins: the longest takes about a minute."""

CAPS = {"default": (7.3,), "int8_embeddings": (7.3,), "offloaded": (7.3, 5.7)}
PEAK_BARS = {"int8_embeddings": 6.3, "offloaded": 5.5}


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


def steps(scale: Scale, setting: str, trainee: Trainee) -> Rows:
    """Peaks and times, without and with a cap, and the plan."""
    rows: Rows = []
    for cap in (None, *(CAPS[setting] if scale.device.type == "cuda" else ())):
        label = f"{setting}{'' if cap is None else f', cap {cap} GiB'}"
        trainee.seconds.clear()
        trainee.peaks.clear()
        release()  # what attaching has left in the allocator would count as reserved
        if scale.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        reserved = 0
        try:
            with capped(scale, cap):
                for _ in range(scale.steps):
                    trainee.step()
                    if scale.device.type == "cuda":  # a step resets the peaks
                        reserved = max(reserved, torch.cuda.max_memory_reserved())
        except torch.OutOfMemoryError as error:
            rows.append({"what": f"{label}, runs", "value": str(error)[:80], "holds": False})
            trainee.optimizer.zero_grad()
            continue
        rows.append({"what": f"{label}, step s", "value": round(median(trainee.seconds), 4)})
        if trainee.peaks:
            peak, early = max(trainee.peaks), max(trainee.peaks[: scale.steps // 3])
            bar = PEAK_BARS.get(setting) if not scale.small else None
            held = {} if bar is None else {"bar": f"<= {bar}", "holds": peak <= bar * GIB}
            rows += [
                {"what": f"{label}, allocated GiB", "value": round(peak / GIB, 3), **held},
                {
                    "what": f"{label}, creep MiB",
                    "value": round((peak - early) / 2**20, 2),
                    "bar": "<= 1",
                    "holds": peak - early <= 2**20,
                },
                {
                    "what": f"{label}, reserved GiB",
                    "value": round(reserved / GIB, 3),
                },
            ]
    peak = max(trainee.peaks, default=None)
    if scale.device.type == "cuda" and setting != "offloaded":  # whose token ids go to the CPU
        trainee.optimizer.zero_grad()
        waits = trainee.waits()
        bar = {"bar": "nothing", "holds": waits == "nothing"}
        rows.append({"what": f"{setting}, the host waits for", "value": waits, **bar})
    if scale.device.type == "cuda":
        rows += profiled(trainee, setting)
        trainee.optimizer.zero_grad()
    return rows + [
        {"what": f"{setting}, {what}", **row} for what, row in _planned(scale, setting, peak)
    ]


def by_torch(trainee: Trainee) -> Rows:
    """A step whose layers compute in plain torch; the optimizer stays as it is."""
    from leanlift.model import use_ops

    use_ops(trainee.model, "torch")
    done = len(trainee.seconds)
    for _ in range(3):
        trainee.step()
    use_ops(trainee.model, "auto")
    taken = round(median(trainee.seconds[done:]), 4)
    return [{"what": "default, layers in plain torch, step s", "value": taken}]


def _planned(scale: Scale, setting: str, peak: int | None) -> list[tuple[str, dict[str, Any]]]:
    try:
        from leanlift.plan import PlanSettings, plan_memory
    except ImportError as error:
        return [("plan", {"value": f"skipped: {error}"})]
    from benchmarks.peers import llama
    from leanlift import LiftConfig

    config = LiftConfig(
        density=0.05, values_dtype="bfloat16", quantize_embeddings=setting != "default"
    )
    cuda = scale.device.type == "cuda"
    least = setting == "offloaded" and cuda
    settings = PlanSettings(
        per_device_train_batch_size=1,
        max_length=scale.tokens,
        optim="sparse_adamw_8bit",
        optim_in_backward=setting != "default",
        activation_offloading=least,
        embedding_on_cpu=least,
        cuda=cuda,
    )
    with tempfile.TemporaryDirectory() as directory:
        llama(*scale.shape).save_pretrained(directory)
        planned = plan_memory(directory, config, settings).phases["train"]
    rows = [("planned GiB", {"value": round(planned / GIB, 3)})]
    if peak:
        rows.append(("planned / measured", {"value": round(planned / peak, 3)}))
    return rows


def peers(scale: Scale, ours: Trainee) -> Rows:
    """PEFT's QLoRA and SHiRA beside us, in turn."""
    import bitsandbytes as bnb

    from benchmarks.peers import entries, lora, shira, stock_loss, trained

    widths = sum(sum(m.weight_tiles.shape) for m in _layers(ours.model))
    rank = max(1, round(entries(ours.model) / widths))
    cuda = scale.device.type == "cuda"

    def built(model: Any) -> tuple[Any, Any, Any, Any]:
        kind = (
            bnb.optim.AdamW8bit if cuda else torch.optim.AdamW
        )  # paged state would not be counted
        model.enable_input_require_grads()
        return model.train(), stock_loss, kind(trained(model), lr=1e-4), nullcontext

    makers = {
        f"QLoRA r={RANK}": lambda: built(lora(base(scale), RANK)),
        f"SHiRA r={rank}": lambda: built(shira(base(scale), rank)),
    }
    rows: Rows = []
    for name, make in makers.items():
        try:
            theirs = Trainee(scale, make)
            ours.seconds.clear()
            ours.peaks.clear()
            for _ in range(max(3, scale.steps // 3)):
                ours.step()
                theirs.step()
        except Exception as error:  # a peer that cannot run here is a row
            rows.append({"what": name, "value": f"skipped: {type(error).__name__} {error}"[:120]})
            continue
        time = median(ours.seconds) / median(theirs.seconds)
        bar = 1.25 if name.startswith("QLoRA") else 1 / 1.5
        held = {} if scale.small else {"bar": f"<= {bar:.3f}", "holds": time <= bar}
        rows.append({"what": f"{name}, step s", "value": round(median(theirs.seconds), 4)})
        rows.append({"what": f"leanlift / {name}, step", "value": round(time, 3), **held})
        if theirs.peaks:
            peak = max(ours.peaks) / max(theirs.peaks)
            held = {"bar": "<= 0.6", "holds": peak <= 0.6} if name.startswith("SHiRA") else {}
            gib = round(max(theirs.peaks) / GIB, 3)
            rows.append({"what": f"{name}, allocated GiB", "value": gib})
            rows += profiled(theirs, name)
            rows.append({"what": f"leanlift / {name}, peak", "value": round(peak, 3), **held})
        del theirs
        release()
    return rows


def _layers(model: Any) -> list[Any]:
    from leanlift.model import lift_layers

    return list(lift_layers(model).values())


def refresh_and_export(scale: Scale, trainee: Trainee) -> Rows:
    from leanlift import refresh_mask

    report = refresh_mask(trainee.model, trainee.optimizer)
    sample = _layers(trainee.model)[:7]

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


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prove(
    scale: Scale, save: Callable[[Rows], object] = lambda rows: None, budget: float = BUDGET
) -> Rows:
    """All sections; one that cannot run is a row that says why.

    Args:
        scale: how large.
        save: called with all rows so far after each section.
        budget: seconds after which no further section begins.
    """
    rows: Rows = []
    started = time.monotonic()

    def section(number: int, run: Callable[[], Rows]) -> None:
        spent = time.monotonic() - started
        try:
            if spent > budget:
                raise TimeoutError(f"not begun after {spent:.0f} s")
            found, took = timed(run)
            found.append({"what": "section, s", "value": round(took, 1)})
        except Exception as error:  # whatever it is: the other sections have things to show
            traceback.print_exc()
            found = [{"what": "section", "value": f"failed: {type(error).__name__} {error}"[:200]}]
            found[0]["holds"] = False
        for row in found:
            rows.append({"section": number, "what": "", "value": "", "bar": "", "holds": "", **row})
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
        save(rows)

    def skipped(what: str) -> Callable[[], Rows]:
        return lambda: [{"what": what, "value": "skipped"}]

    if scale.device.type != "cuda":
        section(1, skipped("Triton kernels, caps and peaks: no CUDA device"))
    section(1, lambda: kernels(scale.device, scale.small))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        for number in range(2, 8):
            section(number, skipped("bitsandbytes is not installed"))
        return rows
    ours: list[Trainee] = []

    def build_and_select() -> Rows:
        peak: list[int] = []
        ours.append(Trainee(scale, lambda: lifted(scale, "default", "principal", peak)))
        rows = selection(scale, ours[0])
        return rows + [{"what": "peak MiB beyond the model", "value": p // 2**20} for p in peak]

    section(2, build_and_select)
    if ours:
        section(3, lambda: steps(scale, "default", ours[0]))
        section(3, lambda: by_torch(ours[0]))
        section(4, lambda: peers(scale, ours[0]))
        section(5, lambda: refresh_and_export(scale, ours[0]))
    ours.clear()
    release()
    section(6, lambda: learning(scale))
    release()
    section(7, lambda: runs(scale.device, scale.small))
    for setting in ("int8_embeddings", "offloaded"):
        release()
        section(
            3, lambda s=setting: steps(scale, s, Trainee(scale, lambda: lifted(scale, s, "random")))
        )
    return rows


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
