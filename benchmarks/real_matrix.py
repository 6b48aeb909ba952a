"""One 4096 x 11008 matrix in NF4 with double quantization through the whole path.

    python -m benchmarks.real_matrix

Claim: selection, forward, backward, refresh and merge work at the size of Llama-2-7B's
down_proj, the mask is the exact one, and no step holds more than a few dense copies of the
matrix. Times are for one CPU thread; the plain dense Linear in the last rows is the baseline of
the same process.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.common import timed, write_rows
from leanlift import LiftConfig, get_lift_model, merge_adapter, refresh_mask, save_adapter
from leanlift.layers import LiftLinear
from leanlift.measure import LiveBytes
from leanlift.model import lift_layers
from leanlift.weights.quantized import WeightFormat, requantize

M, N, TOKENS, RANK = 4096, 11008, 128, 64


class OneBlock(nn.Module):
    """The smallest model that has blocks and a norm: one Linear in a module list."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(N, dtype=torch.bfloat16)
        self.layers = nn.ModuleList([nn.ModuleDict({"down_proj": linear})])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers[0]["down_proj"](self.norm(x))  # type: ignore[index]
        return result


def trained_like(m: int, n: int) -> torch.Tensor:
    """Slow power-law spectrum plus noise, heavy-tailed row and column scales."""
    generator = torch.Generator().manual_seed(0)
    rank = 1024
    left = torch.randn(m, rank, generator=generator) * torch.arange(1, rank + 1) ** -0.6
    weight = left @ torch.randn(rank, n, generator=generator)
    weight += 0.3 * weight.std() * torch.randn(m, n, generator=generator)
    weight *= torch.exp(0.5 * torch.randn(m, 1, generator=generator))
    weight *= torch.exp(0.5 * torch.randn(1, n, generator=generator))
    return 0.02 * weight / weight.std()


def exact_mask(weight: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """Mask of the best rank-R approximation from the float64 Gram matrix's eigenvectors."""
    wide = weight.double()
    vectors = torch.linalg.eigh(wide @ wide.T).eigenvectors[:, -rank:]
    scores = (vectors @ (vectors.T @ wide)).abs().flatten()
    mask = torch.zeros(scores.numel(), dtype=torch.bool)
    mask[torch.topk(scores, count, sorted=False).indices] = True
    return mask


class Rows:
    """Steps as they are taken."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def record(
        self, step: str, seconds: float, live: LiveBytes | None = None, **extra: Any
    ) -> None:
        peak = "" if live is None else round(live.peak / 2**20, 1)
        note = "; ".join(f"{key} {value}" for key, value in extra.items())
        row = {"step": step, "seconds": round(seconds, 3), "peak_mib": peak, "note": note}
        self.rows.append(row)
        print(f"{step:<28}{seconds:>9.2f} s{peak!s:>10} MiB  {note}", flush=True)


def attach(rows: Rows, original: torch.Tensor) -> tuple[OneBlock, LiftLinear]:
    """Quantize and select; the mask is held against the exact one."""
    fmt = WeightFormat("nf4", "bfloat16", 64, double=True)
    tiles, seconds = timed(lambda: requantize(original, fmt, torch.device("cpu")))
    model = OneBlock(tiles.module).train()  # type: ignore[attr-defined]
    rows.record("quantize to NF4", seconds)

    with LiveBytes() as live:
        _, seconds = timed(
            lambda: get_lift_model(model, LiftConfig(approx_rank=RANK), progress=False)
        )
    (layer,) = lift_layers(model).values()
    count = layer.index.count
    dense = layer.weight_tiles.rows(0, M)
    mask, exact_seconds = timed(lambda: exact_mask(dense, RANK, count))
    overlap = mask[layer.index.to_flat()].double().mean().item()
    rows.record("select", seconds, live, overlap=round(overlap, 6), entries=count)
    rows.record("exact mask (fp64 Gram)", exact_seconds)
    assert overlap >= 0.999
    return model, layer


def train(rows: Rows, model: OneBlock, layer: LiftLinear, x: torch.Tensor) -> None:
    """Two passes, one step of an optimizer, a refresh."""
    for attempt in ("first", "second"):
        with LiveBytes() as live:
            y, seconds = timed(lambda: model(x))
        rows.record(f"forward, {attempt}", seconds, live, tokens=TOKENS)
        with LiveBytes() as live:
            _, seconds = timed(lambda y=y: y.float().square().mean().backward())  # type: ignore[misc]
        rows.record(f"backward, {attempt}", seconds, live)
    bytes_per_entry = layer.index.nbytes / layer.index.count
    rows.record("index", 0.0, bytes_per_entry=round(bytes_per_entry, 4))
    assert bytes_per_entry <= 1.25

    optimizer = torch.optim.AdamW([layer.values], lr=2e-3)
    optimizer.step()
    with LiveBytes() as live:
        report, seconds = timed(lambda: refresh_mask(model, optimizer))
    rows.record("refresh", seconds, live, churn=round(report.churn, 4), retired=report.retired)


def merge(rows: Rows, model: OneBlock, layer: LiftLinear, original: torch.Tensor) -> None:
    """Onto both forms of the base, each exact."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        name = "layers.0.down_proj.weight"
        tensors = {name: original, "norm.weight": model.norm.weight.detach()}
        save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
        (base / "config.json").write_text(json.dumps({"model_type": "one-block"}))
        save_adapter(model, Path(folder) / "adapter")
        for onto in ("original", "quantized"):
            out = Path(folder) / onto
            with LiveBytes() as live:
                _, seconds = timed(
                    lambda out=out, onto=onto: merge_adapter(  # type: ignore[misc]
                        Path(folder) / "adapter", out, base=base, onto=onto, progress=False
                    )
                )
            merged = load_file(out / "model.safetensors")[name]
            start = original if onto == "original" else layer.weight_tiles.rows(0, M)
            start = start.float()
            layer.add_offsets_(start, 0, M)
            assert torch.equal(start.half(), merged), onto
            rows.record(f"merge onto {onto}", seconds, live, exact=True)


def plain(rows: Rows, x: torch.Tensor) -> None:
    """The baseline: a dense Linear."""
    linear = nn.Linear(N, M, bias=False, dtype=torch.bfloat16)
    for attempt in ("first", "second"):
        y, seconds = timed(lambda: linear(x))
        rows.record(f"dense forward, {attempt}", seconds)
        _, seconds = timed(lambda y=y: y.float().square().mean().backward())  # type: ignore[misc]
        rows.record(f"dense backward, {attempt}", seconds)


def main() -> None:
    torch.set_num_threads(1)
    original = trained_like(M, N).bfloat16()
    rows = Rows()
    model, layer = attach(rows, original)
    x = torch.randn(TOKENS, N).bfloat16().requires_grad_()
    train(rows, model, layer, x)
    merge(rows, model, layer, original)
    plain(rows, x)
    print(f"Wrote {write_rows('real_matrix', rows.rows)}")


if __name__ == "__main__":
    main()
