"""LiftConfig: what to train, and how the mask is chosen.

A config is unpacked at the edge (`get_lift_model`) and never travels further down: the rooms
below take plain arguments.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from leanlift.errors import UserError
from leanlift.selection import (
    Magnitude,
    Principal,
    Random,
    Scorer,
    count_by_density,
    count_by_rank,
)

SELECTORS = ("principal", "magnitude", "random")
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LiftConfig:
    """How many entries of which matrices are trained, and how they are chosen.

    Attributes:
        density: share of each target matrix that is trained: k = ⌊density · m · n⌋. 0.05 is about
            the budget of the paper's 7B runs (r = 128 is 4.75 % of Llama-2-7B).
        rank_budget: r; if given, k = r · (m + n), the parameter count of a rank-r LoRA, and
            `density` is not used.
        approx_rank: R, the rank of the approximation whose largest entries are the principal
            weights. The paper's 7B runs take 64.
        refresh_interval: optimizer steps between two selections from the current weights; 0:
            the mask is chosen once. The paper takes 10 to 2000, mostly 400.
        selector: "principal" (the method), "magnitude" or "random".
        target_modules: "all-linear" (every Linear inside the blocks; never embeddings, lm_head
            or norms), or endings of module names such as ["q_proj", "v_proj"].
        selection_seed: start of the principal selection's iteration, and the random mask.
    """

    density: float = 0.05
    rank_budget: int | None = None
    approx_rank: int = 64
    refresh_interval: int = 0
    selector: str = "principal"
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    selection_seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        if not 0 < self.density <= 1:
            raise UserError(f"expected a density in (0, 1], got {self.density}: try 0.05.")
        if self.rank_budget is not None and self.rank_budget < 1:
            raise UserError(f"expected a rank_budget of at least 1, got {self.rank_budget}.")
        if self.approx_rank < 1:
            raise UserError(f"expected an approx_rank of at least 1, got {self.approx_rank}.")
        if self.refresh_interval < 0:
            raise UserError(
                f"expected a refresh_interval of 0 (never) or more, got {self.refresh_interval}."
            )
        if self.selector not in SELECTORS:
            raise UserError(f"expected a selector among {SELECTORS}, got {self.selector!r}.")

    def scorer(self) -> Scorer:
        """The selection object that `selector` names."""
        if self.selector == "principal":
            return Principal(rank=self.approx_rank, seed=self.selection_seed)
        if self.selector == "magnitude":
            return Magnitude()
        return Random(seed=self.selection_seed)

    def count(self, shape: tuple[int, int], name: str = "a target") -> int:
        """k for a matrix of this shape.

        Raises:
            UserError: the budget selects nothing, or more than there is.
        """
        if self.rank_budget is not None:
            budget, count = (
                f"rank_budget={self.rank_budget}",
                count_by_rank(shape, self.rank_budget),
            )
        else:
            budget, count = f"density={self.density}", count_by_density(shape, self.density)
        if not 1 <= count <= shape[0] * shape[1]:
            raise UserError(
                f"{budget} selects {count} entries of {name} ({shape[0]}x{shape[1]}); "
                f"expected 1 to {shape[0] * shape[1]}."
            )
        return count

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> LiftConfig:
        """Back from `to_dict`.

        Raises:
            UserError: a key that this version does not know.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(
                f"unknown LiftConfig keys {unknown}: expected some of {sorted(known)}; "
                "the adapter may come from a newer leanlift."
            )
        return cls(**data)
