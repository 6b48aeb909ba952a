"""`leanlift info ADAPTER`: what an adapter holds, without its base."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from leanlift.format import count, loss, share, size, table
from leanlift.io.places import (
    CONFIG_NAME,
    FACTS_NAME,
    OWN_TYPE,
    WEIGHTS_NAME,
    adapter_type,
    export_words,
)

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
    directory = Path(adapter).expanduser()
    if (directory / CONFIG_NAME).is_file() and _is_own(directory):
        return {"adapter": str(adapter), **_described(directory)}
    return {"adapter": str(adapter), **_opened(adapter)}


def _is_own(directory: Path) -> bool:
    from leanlift.io.bounded import MOST_OF_A_STRANGER
    from leanlift.io.files import read_json

    return adapter_type(read_json(directory / CONFIG_NAME, MOST_OF_A_STRANGER)) == OWN_TYPE


def _described(directory: Path) -> dict[str, Any]:
    """Of leanlift's own form, by numpy: nothing heavy is imported."""
    from leanlift.report.adapter import read_adapter

    facts = read_adapter(directory)
    return {
        "form": "leanlift",
        "base": facts.base,
        "base_formats": list(facts.formats),
        "values_dtype": facts.values_dtype,
        "selector": facts.selector,
        "refreshes": facts.refreshes,
        "embedding_rows": facts.embedding_rows,
        "entries": facts.entries,
        "retired": facts.retired,
        "density": facts.entries / facts.weights,
        "bytes_on_disk": _on_disk(directory),
        "modules": [
            {
                "module": matrix.module,
                "shape": list(matrix.shape),
                "entries": matrix.entries,
                "retired": matrix.retired,
                "density": matrix.density,
                "largest": matrix.largest,
                "norm": matrix.norm,
                "bytes": matrix.nbytes,
            }
            for matrix in facts.matrices
        ],
    }


def _opened(adapter: str | Path) -> dict[str, Any]:
    """Of PEFT's form, and of what comes from the hub: as a merge reads it."""
    from leanlift.adapters import open_adapter
    from leanlift.sparse import Offsets

    def largest(store: Offsets) -> float:
        return float(store.values.float().abs().max()) if store.values.numel() else 0.0

    with open_adapter(adapter) as opened:
        if opened.form == "leanlift":
            return _described(opened.directory)
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
                    "largest": max(map(largest, stores)),
                    "norm": sum(float(s.values.double().square().sum()) for s in stores) ** 0.5,
                    "bytes": sum(store.nbytes for store in stores),
                }
            )
        entries = sum(module["entries"] for module in modules)
        weights = sum(m * n for m, n in opened.base.shapes.values())
        return {
            "form": opened.form,
            "base": opened.base.name,
            "base_formats": sorted({str(fmt) for fmt in opened.base.formats.values()}),
            "values_dtype": opened.config.values_dtype,
            "selector": opened.config.selector,
            "refreshes": opened.refreshes,
            "embedding_rows": None,
            "entries": entries,
            "retired": sum(module["retired"] for module in modules),
            "density": entries / weights,
            "bytes_on_disk": _on_disk(opened.directory),
            "modules": modules,
        }


def _on_disk(directory: Path) -> int:
    files = [directory / name for name in FILES]
    return sum(file.stat().st_size for file in files if file.is_file())


def format_info(data: dict[str, Any]) -> str:
    """The description as text; of the modules, those with the largest changes."""
    from leanlift.report.text import chosen_words, format_words, labelled

    modules = sorted(data["modules"], key=lambda module: -module["norm"])
    kind = _kind(data["form"])
    retired = ""
    if data["retired"]:
        retired = f"; {count(data['retired'])} retired: no longer trained, their offsets kept"
    rows = [
        (m["module"], count(m["entries"]), share(m["density"]), loss(m["norm"]), loss(m["largest"]))
        for m in modules[:SHOWN]
    ]
    lines = [
        f"{data['adapter']}: {kind}",
        "",
        *labelled("base", f"{data['base']}, held in {format_words(data['base_formats'])}"),
        *labelled(
            "trained",
            f"{count(data['entries'])} entries, {share(data['density'])} of {len(modules)} "
            f"matrices: {chosen_words(data['selector'])}{retired}",
        ),
        *labelled("refreshes", str(data["refreshes"])),
        *_rows(data["embedding_rows"]),
        *labelled("on disk", f"{size(data['bytes_on_disk'])}, offsets in {data['values_dtype']}"),
        "",
        *table(rows, ["largest changes", "entries", "share", "norm", "largest"]),
    ]
    if len(modules) > SHOWN:
        lines.append(f"… and {len(modules) - SHOWN} more (--json has all)")
    if data["form"] == "leanlift":
        lines += [
            "",
            f"Merge it into its base:  {shlex.join(export_words(data['adapter'], data['base']))}",
            "On a model in Python:    leanlift.load_adapter(model, directory)",
        ]
    return "\n".join(lines)


def _kind(form: str) -> str:
    """What an adapter of this form is called."""
    if form == "leanlift":
        return "a leanlift adapter"
    from leanlift.adapters import FORMS

    return f"a {FORMS[form].words} adapter of PEFT's"


def _rows(rows: int | None) -> list[str]:
    from leanlift.report.text import labelled

    return [] if rows is None else labelled("embedding", f"has grown to {rows:,} rows")
