"""Comparing an adapter's fingerprint with a base, or with another adapter's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import torch

from leanlift.errors import UserError
from leanlift.fingerprint.cells import cells_of
from leanlift.fingerprint.record import BaseFingerprint
from leanlift.fingerprint.samples import Comparison, decode
from leanlift.fingerprint.take import Read
from leanlift.io.bounded import LARGEST_SIDE
from leanlift.weights.quantized import FrozenWeight, dtype_of

logger = logging.getLogger("leanlift")


def check_same_base(
    adapter: BaseFingerprint, model: BaseFingerprint, weight: Callable[[str], FrozenWeight]
) -> None:
    """Compare an adapter's fingerprint with a loaded model.

    Args:
        adapter: the adapter's.
        model: the model's.
        weight: gives the model's frozen weight by the name of its module.

    Raises:
        UserError: they differ; says in what.
    """
    for name, shape in adapter.shapes.items():
        if model.shapes.get(name) != shape:
            raise UserError(
                f"this adapter was trained on {adapter.name}, whose {name} is "
                f"{shape[0]}x{shape[1]}; the loaded model ({model.name}) has "
                f"{model.shapes.get(name, 'no such Linear')}: load the adapter's own base."
            )
        if model.formats[name] != adapter.formats[name]:
            raise UserError(
                f"this adapter was trained over {name} in {adapter.formats[name]} "
                f"({adapter.formats[name].dtype}); the loaded model has it in "
                f"{model.formats[name]} ({model.formats[name].dtype}): load the base in the same "
                "format, or merge the adapter first."
            )
    say_what_is_not_known(adapter)
    comparison = Comparison()
    other = other_end(adapter, model.sampled, model.digest, model.samples, comparison)
    dtype = dtype_of(model.dtype)
    other = other or other_matrix(
        adapter, lambda name, flat: cells_of(weight(name), flat, dtype), comparison
    )
    if other or comparison.is_other:
        raise UserError(
            f"this adapter was trained on {adapter.name} loaded in {adapter.dtype}; the loaded "
            f"model ({model.name}, {model.dtype}) has the same shapes but other weights"
            f"{f' in {other}' if other else ''}: load the adapter's own base."
        )


def other_end(
    adapter: BaseFingerprint,
    sampled: tuple[str, ...],
    digest: str,
    samples: Mapping[str, str],
    comparison: Comparison,
) -> str | None:
    """The norm or embedding in which a base is not the adapter's; None: it is in all of them.

    Args:
        adapter: the adapter's fingerprint.
        sampled, digest, samples: the base's own, taken as for a fingerprint.
        comparison: counts cells.
    """
    if (sampled, digest) == (adapter.sampled, adapter.digest):
        return None
    known = sampled == adapter.sampled and all(name in adapter.samples for name in sampled)
    if not known:
        return "its norms or embedding"
    for name in sampled:
        recorded = decode(adapter.samples[name], LARGEST_SIDE**2)
        found = decode(samples[name], LARGEST_SIDE**2, finite=False)
        if not torch.equal(recorded.flat, found.flat):
            return name
        if not comparison.add(recorded, found.cells, exact=True):
            return name
    return None


def other_matrix(adapter: BaseFingerprint, read: Read, comparison: Comparison) -> str | None:
    """The trained matrix in which a base is not the adapter's; None: it is in all that are
    sampled."""
    for name, (m, n) in adapter.shapes.items():
        if name in adapter.samples:
            recorded = decode(adapter.samples[name], m * n)
            if not comparison.add(recorded, read(name, recorded.flat)):
                return name
    return None


def say_what_is_not_known(adapter: BaseFingerprint) -> None:
    """Log that trained matrices are not sampled, where some are not."""
    if not adapter.knows_matrices:
        logger.warning(
            "This adapter's format has no samples of the matrices that it trained: bases that "
            "differ in those alone cannot be told apart, so make sure that %s is meant.",
            adapter.name,
        )


def check_common_samples(first: BaseFingerprint, second: BaseFingerprint) -> bool:
    """Whether two adapters' samples are of one base, where they were taken at the same places."""
    comparison = Comparison()
    for name, (m, n) in first.shapes.items():
        if name in first.samples and name in second.samples and second.shapes.get(name) == (m, n):
            one, two = (decode(base.samples[name], m * n) for base in (first, second))
            common = one.flat[torch.isin(one.flat, two.flat)]
            if not comparison.add(one.at(common), two.at(common).cells):
                return False
    return not comparison.is_other
