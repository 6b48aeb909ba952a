"""Several adapters of one base as one: a weighted sum.

An entry that several adapters have gets the weighted sum of its offsets; one that only some have
gets what those say, the others counting as zero. Sums are formed in fp32, in the order of the
adapters. So `add` is weights of 1, `average` weights of 1/n, and one adapter alone with a weight
is that adapter scaled. What was retired in any of them is an entry like the others afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from leanlift.adapters.native import AdapterMetadata, write_adapter
from leanlift.adapters.offsets import Adapter
from leanlift.adapters.read import open_adapter
from leanlift.errors import UserError
from leanlift.fingerprint import BaseFingerprint, Layout, check_common_samples
from leanlift.io.tensors import new_directory
from leanlift.sparse import LayerOffsets, Offsets


def combine_adapters(
    adapters: Sequence[str | Path],
    output: str | Path,
    weights: Sequence[float] | None = None,
    progress: bool = True,
) -> None:
    """Write the weighted sum of adapters of one base as an adapter.

    The result has fp32 offsets, the modules and positions of all of them together, and the
    configuration of the first.

    Args:
        adapters: directories or hub names.
        output: a new directory.
        weights: one per adapter; by default 1 each, their sum.
        progress: whether to show a bar over the matrices.

    Raises:
        UserError: adapters of different bases or formats, weights that are not one finite number
            per adapter, a damaged adapter, or an output that exists.
    """
    factors = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
    if not adapters or len(factors) != len(adapters) or not all(map(math.isfinite, factors)):
        raise UserError(
            f"expected at least one adapter and a finite weight for each, got {len(adapters)} "
            f"adapters and the weights {factors}."
        )
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(source)) for source in adapters]
        base = _common_base(opened)
        first = opened[0]
        shapes = {**base.shapes, **first.shapes}
        layers = {
            name: _sum_up(name, shape, opened, factors)
            for name, shape in tqdm(
                shapes.items(), desc="Combining", unit="matrix", disable=not progress
            )
        }
        whole = dict.fromkeys(n for one in opened for n in one.config.modules_to_save)
        config = replace(first.config, values_dtype="float32", modules_to_save=tuple(whole))
        with new_directory(Path(output)) as partial:
            facts = AdapterMetadata(
                config, base, 0, first.special, first.grown, first.task, first.embedding
            )
            write_adapter(partial, layers, facts)


def _common_base(adapters: list[Adapter]) -> BaseFingerprint:
    """The base of all of them, with the shapes of every module that any has trained.

    Raises:
        UserError: they have different bases.
    """
    first = adapters[0].base
    shapes, formats = dict(first.shapes), dict(first.formats)
    for other in adapters[1:]:
        base = other.base
        ends = (first.dtype, first.sampled, first.digest)
        same = ends == (base.dtype, base.sampled, base.digest)
        same = same and check_common_samples(first, base)
        clash = [n for n, fmt in base.formats.items() if formats.setdefault(n, fmt) != fmt]
        clash += [n for n, shape in base.shapes.items() if shapes.setdefault(n, shape) != shape]
        same &= other.config.quantize_embeddings == adapters[0].config.quantize_embeddings
        if not same or clash:
            raise UserError(
                f"{other.directory} was trained over {base.name} in another form than "
                f"{adapters[0].directory} ({first.name}): only adapters of one base, loaded in one "
                "format, can be combined."
            )
        if (other.base.new, other.task) != (adapters[0].base.new, adapters[0].task):
            raise UserError(
                f"{other.directory} and {adapters[0].directory} have other new heads: only "
                "adapters with the same can be combined."
            )
        tokens = [a.config.trainable_token_indices for a in (other, adapters[0])]
        if set(tokens[0]) != set(tokens[1]) or other.embedding != adapters[0].embedding:
            raise UserError(
                f"{other.directory} and {adapters[0].directory} have trained other tokens: only "
                "adapters of the same can be combined."
            )
        if other.grown != adapters[0].grown:
            raise UserError(
                f"{other.directory} and {adapters[0].directory} were trained with other numbers of "
                "rows in the embedding: only adapters with as many can be combined."
            )
    return joined_base([adapter.base for adapter in adapters])


def joined_base(bases: Sequence[BaseFingerprint]) -> BaseFingerprint:
    """What several adapters know of one base, together: where two know of one thing, the first."""

    def of_all(key: Callable[[BaseFingerprint], Mapping[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for base in bases:
            found = {**found, **{n: v for n, v in key(base).items() if n not in found}}
        return found

    return replace(
        bases[0],
        shapes=of_all(lambda base: base.shapes),
        formats=of_all(lambda base: base.formats),
        samples=of_all(lambda base: base.samples),
        parts=of_all(lambda base: base.parts),
        layout=Layout(
            of_all(lambda base: base.layout.names), of_all(lambda base: base.layout.homes)
        ),
    )


def _sum_up(
    name: str, shape: tuple[int, int], adapters: list[Adapter], factors: list[float]
) -> LayerOffsets:
    """One module's entries in all adapters."""
    stores = [adapter.layer(name).stores if name in adapter.shapes else () for adapter in adapters]
    return LayerOffsets(sum_of(name, shape, stores, factors))


def sum_of(
    name: str, shape: tuple[int, int], stores: Sequence[Sequence[Offsets]], factors: Sequence[float]
) -> Offsets:
    """The weighted sum of what several adapters have learned of one matrix: the union of their
    positions, fp32.

    Args:
        name, shape: of the matrix.
        stores: of each adapter, all on one device.
        factors: one per adapter.

    Raises:
        UserError: a sum that is no finite number.
    """
    pairs = [(store, factor) for of, factor in zip(stores, factors, strict=True) for store in of]
    device = pairs[0][0].values.device if pairs else None
    flats = [torch.empty(0, dtype=torch.int64, device=device)]
    values = [torch.empty(0, device=device)]
    for store, factor in pairs:
        flats.append(store.index.to_flat())
        values.append(store.values.float() * (factor * store.scale))
    union, where = torch.cat(flats).unique(sorted=True, return_inverse=True)
    total = torch.zeros(union.numel(), device=device).index_add_(0, where, torch.cat(values))
    if not bool(torch.isfinite(total).all()):
        raise UserError(f"the weighted sum of the offsets of {name} overflows fp32.")
    return Offsets.from_flat(union, total, shape)
