"""Masks of a large model on a GPU, their refresh, its merged weights; and a small one that learns.

A part of `gpu_proof`.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.common import timed
from benchmarks.gpu_kernels import Rows, names_of
from benchmarks.trainee import Scale, Trainee


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

    names = names_of(scale.device)
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
