"""Which base model an adapter belongs to.

Offsets added to the wrong weights give a model that runs and talks nonsense, so every adapter
carries a fingerprint of the base it was trained over, and loading and merging compare it first:

* the names and shapes of the trained matrices,
* the storage format of every quantized Linear (an adapter over NF4 is not one over INT8),
* samples of all trained matrices, all norm weights and the embedding (`leanlift.samples`), which
  are compared with a base in any form, to within what that form leaves open,
* a digest of the latter two, rounded to the dtype of loading: where it is equal, nothing else
  needs to be asked about them.

Adapters of format 1 have no samples: over them, bases that differ in trained matrices alone are
not told apart, and that is said.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from leanlift.cells import Cells, cells_of, dense_cells
from leanlift.errors import UserError
from leanlift.quantized import (
    FrozenWeight,
    WeightFormat,
    dtype_name,
    dtype_of,
)
from leanlift.samples import ENDS, Comparison, Sample, decode, positions, spread

logger = logging.getLogger("leanlift")

SAMPLED_ROWS = 64

Read = Callable[[str, Tensor], Cells]
"""Cells of a base's matrix, by module name, at flat positions."""


@dataclass(frozen=True)
class BaseFingerprint:
    """The identity of a base model.

    Attributes:
        name: where it was loaded from.
        dtype: the dtype it was loaded in.
        shapes: trained matrices, name -> (m, n).
        formats: every trained or quantized Linear, name -> WeightFormat.
        sampled: the tensors behind `digest`, by their names in the checkpoint.
        digest: sha256 of their sampled contents.
        samples: of `sampled` tensors and of trained matrices, name -> `Sample.encode()`.
        revision: the commit of a base from the hub, where it is known.
    """

    name: str
    dtype: str
    shapes: dict[str, tuple[int, int]]
    formats: dict[str, WeightFormat]
    sampled: tuple[str, ...]
    digest: str
    samples: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None

    @property
    def knows_matrices(self) -> bool:
        """Whether every trained matrix is sampled."""
        return all(name in self.samples for name in self.shapes)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> BaseFingerprint:
        """Back from `to_dict`; `data` may come from a file that anyone has written.

        Raises:
            UserError: a value that no fingerprint has; says which.
        """
        known = isinstance(data, dict) and _KEYS - _LATER <= set(data) <= _KEYS
        _expect(known, f"the keys {sorted(_KEYS)}", data)
        name, dtype, shapes, formats = (data[k] for k in ("name", "dtype", "shapes", "formats"))
        sampled, digest = data["sampled"], data["digest"]
        is_name = isinstance(name, str) and 0 < len(name) <= _LONGEST_NAME and name.isprintable()
        _expect(is_name, "the name of the base", name)
        _expect(isinstance(shapes, dict) and len(shapes) > 0, "shapes of trained matrices", shapes)
        for module, shape in shapes.items():
            _expect(_is_module_name(module), "the name of a module", module)
            _expect(_is_shape(shape), f"two sizes for {module}", shape)
        _expect(isinstance(formats, dict), "formats of matrices", formats)
        _expect(set(shapes) <= set(formats), "a format for every trained matrix", list(formats))
        for module in formats:
            _expect(_is_module_name(module), "the name of a module", module)
        is_names = isinstance(sampled, list) and sampled and all(map(_is_module_name, sampled))
        _expect(bool(is_names), "names of sampled tensors", sampled)
        _expect(isinstance(digest, str), "a digest", digest)
        samples, revision = data.get("samples", {}), data.get("revision")
        is_revision = isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision)
        _expect(revision is None or bool(is_revision), "a commit or null", revision)
        _expect(isinstance(samples, dict), "samples of tensors", samples)
        _check_samples(samples, shapes, set(sampled))
        return cls(
            name=name,
            dtype=dtype_name(dtype_of(dtype)),
            shapes={module: (m, n) for module, (m, n) in shapes.items()},
            formats={module: _format(module, fmt) for module, fmt in formats.items()},
            sampled=tuple(sampled),
            digest=digest,
            samples=samples,
            revision=revision,
        )


_KEYS = {"name", "dtype", "shapes", "formats", "sampled", "digest", "samples", "revision"}
_LATER = {"samples", "revision"}  # of format 2
_LARGEST_SIDE = 2**31 - 1
_LONGEST_NAME = 4096  # of a path; it is looked up and printed, so it may hold no control characters


def _expect(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise UserError(
            f"expected {what} in the fingerprint of the base, got {found!r:.80}: the adapter's "
            "configuration is damaged; fetch it again."
        )


def _check_samples(samples: dict[Any, Any], shapes: dict[str, list[int]], ends: set[str]) -> None:
    """Every sample is one of a tensor that the fingerprint speaks of."""
    for name, text in samples.items():
        shape = shapes.get(name)
        known = (shape is not None or name in ends) and isinstance(text, str)
        _expect(known, "samples of the tensors it names", name)
        try:
            decode(text, _LARGEST_SIDE**2 if shape is None else shape[0] * shape[1])
        except ValueError as error:
            _expect(False, f"a sample of {name} ({error})", text)


def _is_module_name(name: Any) -> bool:
    """`a.b.0.c`: nothing that could climb out of a model, or of a directory."""
    return isinstance(name, str) and re.fullmatch(r"\w+(\.\w+)*", name, re.ASCII) is not None


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(side) is int and 1 <= side <= _LARGEST_SIDE for side in shape)
    )


def _format(module: str, data: Any) -> WeightFormat:
    _expect(
        isinstance(data, dict)
        and set(data) == {"kind", "dtype", "blocksize", "double"}
        and data["kind"] in ("nf4", "fp4", "int8", "dense")
        and type(data["blocksize"]) is int
        and data["blocksize"] in _BLOCKSIZES[data["kind"]]
        and type(data["double"]) is bool,
        f"a format of weights for {module}",
        data,
    )
    return WeightFormat(
        data["kind"], dtype_name(dtype_of(data["dtype"])), data["blocksize"], data["double"]
    )


_BLOCKSIZES = {
    "nf4": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "fp4": (32, 64, 128, 256, 512, 1024, 2048, 4096),
    "int8": (0,),
    "dense": (0,),
}
"""What bitsandbytes quantizes with."""


def fingerprint(
    model: nn.Module,
    weights: Mapping[str, FrozenWeight],
    targets: Sequence[str],
    name: str,
    dtype: torch.dtype,
    revision: str | None = None,
) -> BaseFingerprint:
    """Take the fingerprint of a stock model, before anything is attached to it.

    Args:
        model: the base.
        weights: of the targets, then of all else that is quantized, by module.
        targets: modules to train.
        name, revision: where the model was loaded from.
        dtype: in which.
    """
    sampled = _sampled_names(model)
    parameters = dict(model.named_parameters())
    return BaseFingerprint(
        name=name,
        dtype=dtype_name(dtype),
        shapes={target: weights[target].shape for target in targets},
        formats={path: weight.format for path, weight in weights.items()},
        sampled=sampled,
        digest=digest_of(
            sampled, lambda key, rows: _sample(parameters[key], rows), dtype_name(dtype)
        ),
        samples={key: _sample_end(parameters[key]) for key in sampled},
        revision=revision,
    )


def _sample_end(tensor: Tensor) -> str:
    flat = spread(tensor.numel(), ENDS)
    values = tensor.detach().reshape(-1)[flat.to(tensor.device)]
    return Sample(flat, dense_cells(values, tensor.dtype)).encode()


def with_samples(
    base: BaseFingerprint, masks: Mapping[str, Callable[[], Tensor]], read: Read
) -> BaseFingerprint:
    """A fingerprint that knows its trained matrices.

    Args:
        base: without them.
        masks: give the sorted positions that each trains.
        read: gives cells of a target.
    """
    samples = dict(base.samples)
    for name, mask in masks.items():
        m, n = base.shapes[name]
        flat = positions(m * n, mask(), len(masks))
        samples[name] = Sample(flat, read(name, flat)).encode()
    return replace(base, samples=samples)


def digest_of(names: tuple[str, ...], read: Callable[[str, int], Tensor], dtype: str) -> str:
    """sha256 over the sampled rows of the named tensors, rounded to `dtype`.

    Args:
        names: tensors to read.
        read: gives at most that many evenly spaced rows of a tensor (all of a 1-D one).
        dtype: the dtype the base is loaded in.
    """
    digest = hashlib.sha256()
    for name in names:
        rows = read(name, SAMPLED_ROWS).detach().to(dtype_of(dtype)).float().cpu().contiguous()
        digest.update(name.encode())
        digest.update(rows.numpy().tobytes())
    return digest.hexdigest()


def sampled_rows(size: int, rows: int) -> list[int]:
    """Evenly spaced row numbers, at most `rows` of them."""
    return sorted({round(i * (size - 1) / max(1, rows - 1)) for i in range(min(rows, size))})


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
        recorded = decode(adapter.samples[name], _LARGEST_SIDE**2)
        found = decode(samples[name], _LARGEST_SIDE**2, finite=False)
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


def _sampled_names(model: nn.Module) -> tuple[str, ...]:
    """All 1-D weights (norms) and the input embedding, sorted."""
    names = [
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and name.endswith(".weight")
    ]
    get_embedding = getattr(model, "get_input_embeddings", None)
    if get_embedding is not None:
        weight = get_embedding().weight
        names += [name for name, parameter in model.named_parameters() if parameter is weight]
    return tuple(sorted(names))


def _sample(tensor: Tensor, rows: int) -> Tensor:
    if tensor.dim() == 1:
        return tensor
    return tensor[sampled_rows(tensor.shape[0], rows)]
