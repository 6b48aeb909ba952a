"""`leanlift info ADAPTER`: what an adapter holds, without its base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from leanlift.adapter import CONFIG_NAME, FACTS_NAME, WEIGHTS_NAME, Store, open_adapter
from leanlift.memory import human

FILES = (WEIGHTS_NAME, CONFIG_NAME, FACTS_NAME)
SHOWN = 10


def info_command(adapter: str, as_json: bool) -> int:
    """Print modules, entries, bytes, density, largest changes and base."""
    data = describe(adapter)
    print(json.dumps(data, indent=2) if as_json else format_info(data))
    return 0


def describe(adapter: str | Path) -> dict[str, Any]:
    """What an adapter, of a directory or a hub name, holds; JSON-ready.

    Raises:
        UserError: no adapter, or a damaged one.
    """
    with open_adapter(adapter) as opened:
        modules = []
        for name, shape in opened.base.shapes.items():
            offsets = opened.layer(name)
            stores = offsets.stores
            modules.append(
                {
                    "module": name,
                    "shape": list(shape),
                    "entries": offsets.active.index.count,
                    "retired": 0 if offsets.retired is None else offsets.retired.index.count,
                    "density": offsets.active.index.count / (shape[0] * shape[1]),
                    "largest": max(_largest(store) for store in stores),
                    "norm": sum(float(s.values.double().square().sum()) for s in stores) ** 0.5,
                    "bytes": sum(store.nbytes for store in stores),
                }
            )
        entries = sum(module["entries"] for module in modules)
        weights = sum(m * n for m, n in opened.base.shapes.values())
        return {
            "adapter": str(adapter),
            "form": opened.form,
            "base": opened.base.name,
            "base_formats": sorted({str(fmt) for fmt in opened.base.formats.values()}),
            "values_dtype": opened.config.values_dtype,
            "selector": opened.config.selector,
            "refreshes": opened.refreshes,
            "embedding_rows": None if opened.grown is None else opened.grown.rows,
            "entries": entries,
            "retired": sum(module["retired"] for module in modules),
            "density": entries / weights,
            "bytes_on_disk": sum(
                (opened.directory / file).stat().st_size
                for file in FILES
                if (opened.directory / file).is_file()
            ),
            "modules": modules,
        }


def format_info(data: dict[str, Any]) -> str:
    """The description as text; of the modules, those with the largest changes."""
    modules = sorted(data["modules"], key=lambda module: -module["norm"])
    lines = [
        f"{data['adapter']}: {len(modules)} modules of {data['base']}",
        f"{data['entries']:,} entries ({data['density']:.2%} of their weights, "
        f"{data['values_dtype']}), {data['retired']:,} retired after {data['refreshes']} refreshes",
        f"chosen by {data['selector']}, over {', '.join(data['base_formats'])}; "
        f"{human(data['bytes_on_disk'])} on disk",
        *_rows(data["embedding_rows"]),
        "",
        f"{'largest changes':<44}{'entries':>12}{'density':>9}{'norm':>11}{'largest':>11}",
    ]
    for module in modules[:SHOWN]:
        lines.append(
            f"{module['module']:<44}{module['entries']:>12,}{module['density']:>9.2%}"
            f"{module['norm']:>11.4g}{module['largest']:>11.4g}"
        )
    if len(modules) > SHOWN:
        lines.append(f"… and {len(modules) - SHOWN} more (--json has all)")
    return "\n".join(lines)


def _rows(rows: int | None) -> list[str]:
    return [] if rows is None else [f"over an embedding that has grown to {rows:,} rows"]


def _largest(store: Store) -> float:
    return float(store.values.float().abs().max()) if store.values.numel() else 0.0
