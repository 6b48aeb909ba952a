"""The fingerprint as a record, and as JSON that anyone may have written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from leanlift.errors import UserError
from leanlift.fingerprint.layout import Layout
from leanlift.fingerprint.samples import decode
from leanlift.io.bounded import LARGEST_SIDE, is_module_name, is_shape
from leanlift.weights.quantized import WeightFormat, dtype_name, dtype_of


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
        layout: where tensors are in its checkpoint that are not under their own names.
        parts: of trained matrices that are stacks of experts, how many each has.
        new: trained matrices that the checkpoint has not, whose base is zero.
    """

    name: str
    dtype: str
    shapes: dict[str, tuple[int, int]]
    formats: dict[str, WeightFormat]
    sampled: tuple[str, ...]
    digest: str
    samples: Mapping[str, str] = field(default_factory=dict)
    revision: str | None = None
    layout: Layout = field(default_factory=Layout)
    parts: Mapping[str, int] = field(default_factory=dict)
    new: tuple[str, ...] = ()

    @property
    def stored(self) -> dict[str, tuple[int, int]]:
        """The trained matrices that the checkpoint has, name -> (m, n)."""
        return {name: shape for name, shape in self.shapes.items() if name not in self.new}

    @property
    def knows_matrices(self) -> bool:
        """Whether every trained matrix of the checkpoint is sampled."""
        return all(name in self.samples for name in self.stored)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        data = asdict(self)
        del data["layout"], data["parts"], data["new"]
        if self.layout:
            data["layout"] = self.layout.to_dict()
        if self.parts:
            data["parts"] = dict(self.parts)
        return {**data, "new": list(self.new)} if self.new else data

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
            _expect(is_module_name(module), "the name of a module", module)
            _expect(is_shape(shape), f"two sizes for {module}", shape)
        _expect(isinstance(formats, dict), "formats of matrices", formats)
        _expect(set(shapes) <= set(formats), "a format for every trained matrix", list(formats))
        for module in formats:
            _expect(is_module_name(module), "the name of a module", module)
        is_names = isinstance(sampled, list) and sampled and all(map(is_module_name, sampled))
        _expect(bool(is_names), "names of sampled tensors", sampled)
        _expect(isinstance(digest, str), "a digest", digest)
        samples, revision = data.get("samples", {}), data.get("revision")
        is_revision = isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{40}", revision)
        _expect(revision is None or bool(is_revision), "a commit or null", revision)
        _expect(isinstance(samples, dict), "samples of tensors", samples)
        _check_samples(samples, shapes, set(sampled))
        _check_parts(parts := data.get("parts", {}), shapes)
        new = data.get("new", [])
        is_new = isinstance(new, list) and all(isinstance(n, str) and n in shapes for n in new)
        _expect(is_new, "names of trained matrices", new)
        try:
            layout = Layout.from_dict(data.get("layout", {}))
        except ValueError as error:
            _expect(False, str(error), data["layout"])
        return cls(
            name=name,
            dtype=dtype_name(dtype_of(dtype)),
            shapes={module: (m, n) for module, (m, n) in shapes.items()},
            formats={module: _format(module, fmt) for module, fmt in formats.items()},
            sampled=tuple(sampled),
            digest=digest,
            samples=samples,
            revision=revision,
            layout=layout,
            parts=parts,
            new=tuple(new),
        )


_LATER = {"samples", "revision", "layout", "parts", "new"}  # of formats 2, 4 and 5
_KEYS = {"name", "dtype", "shapes", "formats", "sampled", "digest"} | _LATER
_LONGEST_NAME = 4096  # of a path; it is looked up and printed, so it may hold no control characters


def _expect(holds: bool, what: str, found: Any) -> None:
    if not holds:
        raise UserError(
            f"expected {what} in the fingerprint of the base, got {found!r:.80}: the adapter's "
            "configuration is damaged; fetch it again."
        )


def _check_parts(parts: Any, shapes: dict[str, list[int]]) -> None:
    """Every stack is a trained matrix, whose rows its experts share."""
    _expect(isinstance(parts, dict), "how many experts a matrix has", parts)
    for module, count in parts.items():
        fits = module in shapes and type(count) is int and 0 < count <= shapes[module][0]
        _expect(fits and shapes[module][0] % count == 0, f"experts of {module}", count)


def _check_samples(samples: dict[Any, Any], shapes: dict[str, list[int]], ends: set[str]) -> None:
    """Every sample is one of a tensor that the fingerprint speaks of."""
    for name, text in samples.items():
        shape = shapes.get(name)
        known = (shape is not None or name in ends) and isinstance(text, str)
        _expect(known, "samples of the tensors it names", name)
        try:
            decode(text, LARGEST_SIDE**2 if shape is None else shape[0] * shape[1])
        except ValueError as error:
            _expect(False, f"a sample of {name} ({error})", text)


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
