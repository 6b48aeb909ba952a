"""Experts that a checkpoint holds in MXFP4, as the stacks of matrices that they are.

GPT-OSS is published so: of a stack [E, m, n] the checkpoint has the transposes, [E, n, m], in
groups of 32 numbers along m. `<stack>_blocks` uint8 [E, n, m / 32, 16] has two 4-bit numbers (E2M1)
a byte, the lower half first; `<stack>_scales` uint8 [E, n, m / 32] the power of two of each group,
plus 127. Every number is one of bfloat16, so the stack that is seen here is what was published, and
a merge adds to it as to any 16-bit one. Rows, and single entries, are decoded alone.

Format: OCP Microscaling Formats (MX) v1.0, section 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from leanlift.errors import UserError
from leanlift.source.checkpoint import SourceTensor

BLOCKS, SCALES = "_blocks", "_scales"
GROUP = 32
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Mxfp4Stack(SourceTensor):
    """A stack [E, m, n] of a checkpoint, read from its `_blocks` and `_scales`."""

    _scales: Any

    @classmethod
    def of(cls, blocks: SourceTensor, scales: SourceTensor) -> Mxfp4Stack:
        """The stack of two tensors of a checkpoint.

        Raises:
            UserError: they do not fit each other.
        """
        name = blocks.name.removesuffix(BLOCKS)
        fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, GROUP // 2)
        if not fits or {blocks.dtype, scales.dtype} != {torch.uint8}:
            raise UserError(
                f"{name} of the base is in MXFP4, but not whole: expected blocks [E, n, groups, "
                f"{GROUP // 2}] and scales [E, n, groups] in uint8, got {blocks.shape} and "
                f"{scales.shape}: fetch the checkpoint again."
            )
        experts, n, groups, _ = blocks.shape
        return cls(name, (experts, GROUP * groups, n), DTYPE, blocks, scales)

    @property
    def stored_names(self) -> tuple[str, ...]:
        return self.name + BLOCKS, self.name + SCALES

    def rows(self, start: int, stop: int) -> Tensor:
        m = self.shape[1]
        return self.matrix_rows(start * m, stop * m).unflatten(0, (stop - start, m))

    def matrix_rows(self, start: int, stop: int) -> Tensor:
        m = self.shape[1]
        pieces = [
            self._expert_rows(expert, max(start - expert * m, 0), min(stop - expert * m, m))
            for expert in range(start // m, -(-stop // m))
        ]
        empty = torch.empty(0, self.shape[2], dtype=DTYPE)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces or [empty])

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0])

    def entries(self, flat: Tensor) -> Tensor:
        _, m, n = self.shape
        expert, row, column = flat // (m * n), flat // n % m, flat % n
        group = (expert * n + column) * (m // GROUP) + row // GROUP
        packed = self._slice.entries(group * (GROUP // 2) + row % GROUP // 2)
        codes = torch.where(row % 2 == 1, packed >> 4, packed & 15)
        return _decoded(codes, self._scales.entries(group))

    def _expert_rows(self, expert: int, start: int, stop: int) -> Tensor:
        """Rows `start:stop` of one expert: groups of each of its columns, as they are stored."""
        first, last = start // GROUP, -(-stop // GROUP)
        packed = self._slice.rows(expert, expert + 1)[0, :, first:last]
        codes = torch.stack((packed & 15, packed >> 4), -1).flatten(2)  # [n, groups, 32]
        scales = self._scales.rows(expert, expert + 1)[0, :, first:last, None]
        stored = _decoded(codes, scales).flatten(1)
        return stored[:, start - first * GROUP : stop - first * GROUP].t().contiguous()


def _decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of 4-bit codes under their groups' scales, which are broadcast, in bfloat16."""
    table = torch.tensor((*E2M1, *(-number for number in E2M1)), dtype=DTYPE)
    return torch.ldexp(table[codes.int()], scales.int() - 127)
