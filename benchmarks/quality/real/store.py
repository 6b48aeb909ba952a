"""Runs as they come: a CSV of one line a run, and one beside it with the loss of every row."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.common import environment
from benchmarks.quality.real.measure import Losses

Row = dict[str, Any]
Key = tuple[str, str, str, str]
"""Density, method, learning rate and seed, as they stand in the file."""


def key_of(density: float, method: str, lr: float, seed: int) -> Key:
    return f"{density:g}", method, f"{lr:.2e}", str(seed)


@dataclass(frozen=True)
class Asked:
    """What a run was asked: nats of each row by set, fp64 [N], and the share of right probes."""

    nats: dict[str, Tensor]
    right: float


class Store:
    """Two files; a run that is there is not made again. Several processes may append: a run is
    one short write to each.

    Args:
        path: of the first; the second is called `<name>_rows.csv`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows_path = path.with_name(path.stem + "_rows.csv")

    def runs(self) -> list[Row]:
        """Runs whose rows are there too, in the order in which they were made."""
        kept = {_key(row) for row in _read(self.rows_path)}
        return [row for row in _read(self.path) if _key(row) in kept]

    def find(self, key: Key) -> Row | None:
        return next((row for row in self.runs() if _key(row) == key), None)

    def add(self, key: Key, row: Row, asked: dict[str, Losses]) -> Row:
        named = dict(zip(("density", "method", "lr", "seed"), key, strict=True))
        nats = {name: " ".join(f"{value:.4f}" for value in of.nats) for name, of in asked.items()}
        _append(self.path, {**named, **row, **environment()})
        _append(self.rows_path, {**named, **nats})
        return {**named, **row}

    def nats(self) -> dict[Key, dict[str, Tensor]]:
        """Nats of every row of every run, fp64 [N] by set."""
        return {
            _key(row): {
                name: torch.tensor([float(v) for v in text.split()], dtype=torch.float64)
                for name, text in list(row.items())[4:]
            }
            for row in _read(self.rows_path)
        }


def _key(row: Row) -> Key:
    return row["density"], row["method"], row["lr"], row["seed"]


def _read(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _append(path: Path, row: Row) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.is_file()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)
