"""What stays in memory from step to step, for the real shapes of 7B and 8B models.

    python -m benchmarks.static_bytes

Adds up the storage rules that the tests hold against real tensors; nothing is loaded. Activations
are not in it: they depend on batch, length and attention kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.common import write_rows
from leanlift.selection import count_by_density
from leanlift.sparse import index_nbytes
from leanlift.weights.quantized import WeightFormat

DENSITY = 0.05
GIB = 2**30


@dataclass(frozen=True)
class Shape:
    """A Llama-like model, as its config.json has it."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int

    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features) of every Linear in the blocks."""
        kv = self.hidden // self.heads * self.kv_heads
        block = [
            (self.hidden, self.hidden),
            (kv, self.hidden),
            (kv, self.hidden),
            (self.hidden, self.hidden),
            (self.intermediate, self.hidden),
            (self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
        ]
        return block * self.layers


MODELS = (
    Shape("Llama-2-7B", 4096, 11008, 32, 32, 32, 32000),
    Shape("Llama-3-8B", 4096, 14336, 32, 32, 8, 128256),
    Shape("Qwen2.5-7B", 3584, 18944, 28, 28, 4, 152064),
)


def main() -> None:
    fmt = WeightFormat("nf4", "bfloat16", 64, double=True)
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        linears = model.linears()
        entries = sum(count_by_density(shape, DENSITY) for shape in linears)
        scratch = 2 * max(m * n for m, n in linears)
        parts = {
            "base NF4 + double": sum(fmt.nbytes(shape) for shape in linears),
            "embeddings and head bf16": 2 * 2 * model.vocabulary * model.hidden,
            "index": sum(index_nbytes(s, count_by_density(s, DENSITY)) for s in linears),
            "values fp32": 4 * entries,
            "gradients fp32": 4 * entries,
            "Adam 8-bit": 2 * entries + 2 * 4 * -(-entries // 256),
            "scratch bf16": scratch,
        }
        total = sum(parts.values())
        with_fp32 = total - parts["Adam 8-bit"] + 8 * entries
        row = {"model": model.name, "entries": entries}
        row |= {name: round(nbytes / GIB, 3) for name, nbytes in parts.items()}
        row |= {
            "total 8-bit Adam": round(total / GIB, 3),
            "total fp32 Adam": round(with_fp32 / GIB, 3),
        }
        row["index bytes per entry"] = round(parts["index"] / entries, 4)
        rows.append(row)
        print("\n".join(f"{key:<26}{value}" for key, value in row.items()), end="\n\n")
    print(f"GiB unless named otherwise. Wrote {write_rows('static_bytes', rows)}")


if __name__ == "__main__":
    main()
