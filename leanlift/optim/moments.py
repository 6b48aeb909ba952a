"""The two moments of Adam in an optimizer's state: three layouts, one way to read and write them.

A layout reads both moments of a parameter as fp32 and writes them back where they came from:

* `Float32Moments`: "exp_avg", "exp_avg_sq", fp32 [k]; torch's own names, and `SparseAdamW`'s.
* `EightBitMoments`: `SparseAdamW`'s codes, uint8 [k], and scales, fp32 [ceil(k / 256)].
* `BnbMoments`: what bitsandbytes' Adam keeps, in 8 or 32 bits, paged or not.

8-bit moments use bitsandbytes' dynamic maps in blocks of 256 entries, so they cost 2 + 8/256 bytes
per entry. A zero stays an exact zero, and a positive second moment is never stored as zero: an
update divides by its root.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.ops import MomentParts
from leanlift.weights import bnb

BLOCK = bnb.MOMENT_BLOCK
CHUNK = 2**18
"""Entries that `SparseAdamW` updates at once, unless told otherwise."""

TABLES_NBYTES = 2 * 4 * 256
"""The lookup tables of 8-bit moments, one pair per device."""

State = dict[str, Any]


class Moments(Protocol):
    """A layout of both moments in the state of one parameter."""

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        """First and second moments, fp32 [k]; they may share the state's storage."""
        ...

    def write(self, state: State, first: Tensor, second: Tensor) -> None:
        """Write fp32 moments [k] into the storage they were read from."""
        ...


class OwnMoments(Moments, Protocol):
    """A layout that `SparseAdamW` can create and cut into chunks."""

    keys: tuple[str, ...]

    def create(self, count: int, device: torch.device) -> State:
        """The state of `count` entries before the first step: zeros."""
        ...

    def chunk(self, state: State, start: int, stop: int) -> State:
        """Views of entries `start:stop`, a state of the same layout."""
        ...

    def parts(self, state: State) -> MomentParts:
        """The state's own tensors, for a kernel that reads and writes them itself."""
        ...

    def nbytes(self, count: int) -> int:
        """Bytes of both moments, from the number of entries alone."""
        ...


class Float32Moments:
    """Both moments as they are; reading them copies nothing."""

    keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def create(self, count: int, device: torch.device) -> State:
        return {key: torch.zeros(count, device=device) for key in self.keys}

    def chunk(self, state: State, start: int, stop: int) -> State:
        return {key: state[key][start:stop] for key in self.keys}

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        return state["exp_avg"], state["exp_avg_sq"]

    def write(self, state: State, first: Tensor, second: Tensor) -> None:
        state["exp_avg"].copy_(first)  # nothing to do where they were changed in place
        state["exp_avg_sq"].copy_(second)

    def parts(self, state: State) -> MomentParts:
        return MomentParts(state["exp_avg"], state["exp_avg_sq"])

    def nbytes(self, count: int) -> int:
        return 2 * 4 * count


class EightBitMoments:
    """Codes and block scales. New state reads as zero, because its scales are zero."""

    keys: tuple[str, ...] = (
        "exp_avg_codes",
        "exp_avg_absmax",
        "exp_avg_sq_codes",
        "exp_avg_sq_absmax",
    )

    def create(self, count: int, device: torch.device) -> State:
        codes, scales = (torch.uint8, count), (torch.float32, -(-count // BLOCK))
        return {
            key: torch.zeros(size, dtype=dtype, device=device)
            for key, (dtype, size) in zip(self.keys, 2 * (codes, scales), strict=True)
        }

    def chunk(self, state: State, start: int, stop: int) -> State:
        """As the protocol says; `start` is a multiple of 256."""
        entries, blocks = slice(start, stop), slice(start // BLOCK, -(-stop // BLOCK))
        return {key: state[key][entries if key.endswith("codes") else blocks] for key in self.keys}

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        return self._read(state, "exp_avg"), self._read(state, "exp_avg_sq")

    def write(self, state: State, first: Tensor, second: Tensor) -> None:
        for name, moment in (("exp_avg", first), ("exp_avg_sq", second)):
            codes, absmax = state[f"{name}_codes"], state[f"{name}_absmax"]
            signed = name == "exp_avg"
            table = bnb.moment_table(codes.device, signed)
            bnb.quantize_moment(moment, table, codes, absmax, signed)

    def parts(self, state: State) -> MomentParts:
        device = state["exp_avg_codes"].device
        return MomentParts(
            state["exp_avg_codes"],
            state["exp_avg_sq_codes"],
            state["exp_avg_absmax"],
            state["exp_avg_sq_absmax"],
            bnb.moment_table(device, signed=True),
            bnb.moment_table(device, signed=False),
        )

    def nbytes(self, count: int) -> int:
        return 2 * (count + 4 * -(-count // BLOCK))

    @staticmethod
    def _read(state: State, name: str) -> Tensor:
        codes, absmax = state[f"{name}_codes"], state[f"{name}_absmax"]
        table = bnb.moment_table(codes.device, signed=name == "exp_avg")
        return bnb.dequantize_moment(codes, absmax, table)


class BnbMoments:
    """bitsandbytes' own state."""

    def read(self, state: State) -> tuple[Tensor, Tensor]:
        return bnb.read_moment(state, 1), bnb.read_moment(state, 2)

    def write(self, state: State, first: Tensor, second: Tensor) -> None:
        bnb.write_moment(state, 1, first)
        bnb.write_moment(state, 2, second)


OWN_MOMENTS: dict[str, OwnMoments] = {"float32": Float32Moments(), "8bit": EightBitMoments()}


def own_moments(name: str) -> OwnMoments:
    """A layout of `SparseAdamW` by name.

    Raises:
        UserError: neither "float32" nor "8bit".
    """
    if name not in OWN_MOMENTS:
        raise UserError(
            f"moments must be one of {', '.join(OWN_MOMENTS)}, got {name!r}: choose one of them."
        )
    return OWN_MOMENTS[name]


def adamw_nbytes(count: int, moments: str = "float32") -> int:
    """Bytes of `SparseAdamW`'s state of a parameter with `count` entries, its step included.

    The lookup tables of 8-bit moments, shared by all parameters of a device, are not in it:
    they are `TABLES_NBYTES` once.

    Raises:
        UserError: unknown `moments`.
    """
    return 4 + own_moments(moments).nbytes(count)
