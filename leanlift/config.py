"""LiftConfig: what to train, and how the mask is chosen.

A config is unpacked at the edge (`get_lift_model`) and never travels further down: the rooms
below take plain arguments.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from leanlift.errors import MaskError, UserError
from leanlift.selection import (
    Magnitude,
    Principal,
    Random,
    Scorer,
    count_by_density,
    count_by_rank,
)

SELECTORS = ("principal", "magnitude", "random", "gradient")
ALL_LINEAR = "all-linear"
TARGET_PRESETS = (ALL_LINEAR, "attention", "mlp")
FORMER_NAMES = {"settled_limit": "retired_limit", "quantize_ends": "quantize_embeddings"}
LARGEST_LIMIT = 1e6  # times the trained entries: far beyond what any density leaves to retire
MOST_PATTERNS, LONGEST_PATTERN = 64, 256  # compiled as they are read, from anyone's file
VALUES_DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class LiftConfig:
    """How many entries of which matrices are trained, and how they are chosen.

    Where a default comes from stands with it; "measured" means `benchmarks/quality`, a miniature.

    Attributes:
        density: share of each target matrix that is trained: k = ⌊density · m · n⌋. 0.05 is about
            the budget of the paper's 7B runs (r = 128 is 4.75 % of Llama-2-7B). Measured, half of
            it learns less and twice as much no more.
        rank_budget: r; if given, k = r · (m + n), the parameter count of a rank-r LoRA, and
            `density` is not used.
        approx_rank: R, the rank of the approximation whose largest entries are the principal
            weights. The paper's 7B runs take 64, half of r; measured, r is ahead of 1 and of 8 r.
        refresh_interval: optimizer steps between two selections from the current weights; 0:
            the mask is chosen once. The paper takes 10 to 2000, mostly 400. Measured, refreshes
            change what is learned by less than the seeds do and keep a little more of the source;
            the default is 0 because retired entries take memory.
        refresh_margin: hysteresis; at a refresh the scores of active entries count 1 + margin
            times, so that an entry leaves only where a newcomer beats it by the margin. 0: the
            method as published; not measured.
        retired_limit: entries that may be retired (let go by refreshes, their offsets kept), as a
            share of the trained ones, in each matrix; None: no bound. At the bound a refresh
            admits fewer newcomers. 0.5 is our choice: the store then costs at most about a fifth
            of what the trained entries and their fp32 optimizer state do.
        selector: "principal" (the method), "magnitude", "random", or "gradient" (largest
            accumulated gradient over a calibration set). The paper's ablation on Llama-2-7B has
            principal ahead of magnitude ahead of gradient, which is why it is the default.
            Measured, principal, magnitude and random learn as much, the latter two at up to three
            times the learning rate.
        block: b; above 1, b x b blocks of the principal scores are taken whole (the paper's
            structured variant takes 4); k is rounded down to a multiple of b². 1, as in the
            paper's main runs.
        target_modules: "all-linear" (every Linear inside the blocks; never embeddings, lm_head
            or norms; the paper's), "attention" or "mlp" (those of them), or endings of module
            names such as ["q_proj", "v_proj"].
        density_pattern: densities of their own for some targets, as PEFT's `rank_pattern` has
            ranks: a regular expression for the end of a module's name -> density, e.g.
            {"down_proj": 0.1, r"layers\\.0\\..*": 0.02}. The first match counts, and takes
            precedence over density and rank_budget.
        values_dtype: of the trained offsets and their gradients: "float32", or "bfloat16" for two
            bytes less each; that needs an optimizer that rounds stochastically (`SparseAdamW`).
            fp32 by default because any optimizer can train it.
        quantize_embeddings: whether the frozen embedding and output head are held in INT8, one
            scale per row. They are not trained; an export onto the original has them in 16 bits.
            Off by default: the model is then the one that stock transformers loads.
        selection_seed: start of the principal selection's iteration, and the random mask.
        selection_tile_mib: how much of a matrix the selection reads at once, in MiB. Changes
            memory, never the mask.
    """

    density: float = 0.05
    rank_budget: int | None = None
    approx_rank: int = 64
    refresh_interval: int = 0
    refresh_margin: float = 0.0
    retired_limit: float | None = 0.5
    selector: str = "principal"
    block: int = 1
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    density_pattern: Mapping[str, float] = field(default_factory=dict)
    values_dtype: str = "float32"
    quantize_embeddings: bool = False
    selection_seed: int = 0
    selection_tile_mib: int = 32

    def __post_init__(self) -> None:
        if isinstance(self.target_modules, list):
            object.__setattr__(self, "target_modules", tuple(self.target_modules))
        self._check_types()
        for density in (self.density, *self.density_pattern.values()):
            if not 0 < density <= 1:
                raise UserError(f"expected a density in (0, 1], got {density}: try 0.05.")
        longest = max(map(len, self.density_pattern), default=0)
        if len(self.density_pattern) > MOST_PATTERNS or longest > LONGEST_PATTERN:
            raise UserError(
                f"expected at most {MOST_PATTERNS} patterns of at most {LONGEST_PATTERN} "
                f"characters as density_pattern, got {len(self.density_pattern)}, the longest of "
                f"{longest}."
            )
        for pattern in self.density_pattern:
            try:
                re.compile(pattern)
                re.compile(_whole_name(pattern))  # in which it may not have flags of its own
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"the density_pattern {pattern!r:.200} is no regular expression for the end "
                    f"of a name: {error}."
                ) from None
        if self.block < 1 or (self.block > 1 and self.selector != "principal"):
            raise UserError(
                f"expected block=1, or more with selector=principal; got block={self.block} with "
                f"selector={self.selector}."
            )
        if self.selector == "gradient" and self.refresh_interval:
            raise UserError(
                "selector=gradient needs its calibration set for every selection: use "
                "refresh_interval=0 with it."
            )
        if self.values_dtype not in VALUES_DTYPES:
            raise UserError(
                f"expected a values_dtype among {VALUES_DTYPES}, got {self.values_dtype!r}."
            )
        if self.selection_tile_mib < 1:
            raise UserError(
                f"expected a selection_tile_mib of at least 1, got {self.selection_tile_mib}."
            )
        if self.rank_budget is not None and self.rank_budget < 1:
            raise UserError(f"expected a rank_budget of at least 1, got {self.rank_budget}.")
        if self.approx_rank < 1:
            raise UserError(f"expected an approx_rank of at least 1, got {self.approx_rank}.")
        if self.refresh_interval < 0:
            raise UserError(
                f"expected a refresh_interval of 0 (never) or more, got {self.refresh_interval}."
            )
        if not 0 <= self.refresh_margin < float("inf"):
            raise UserError(
                f"expected a refresh_margin of 0 or more, got {self.refresh_margin}: try 0.1."
            )
        if self.retired_limit is not None and not 0 <= self.retired_limit <= LARGEST_LIMIT:
            raise UserError(
                "expected a retired_limit of 0 or more, or none, and no more than "
                f"{LARGEST_LIMIT:g}; got {self.retired_limit}: try 0.5."
            )
        if self.selector not in SELECTORS:
            raise UserError(f"expected a selector among {SELECTORS}, got {self.selector!r}.")

    def _check_types(self) -> None:
        """A config may come from a file that anyone has written."""
        for name, (kind, is_kind) in _FIELDS.items():
            value = getattr(self, name)
            if not is_kind(value):
                raise UserError(f"expected {name} to be {kind}, got {value!r:.80}.")

    def scorer(self) -> Scorer:
        """The selection object that `selector` names, for one that needs the weights alone.

        Raises:
            UserError: selector="gradient", which needs a calibration set.
        """
        if self.selector == "principal":
            return Principal(rank=self.approx_rank, block=self.block, seed=self.selection_seed)
        if self.selector == "magnitude":
            return Magnitude()
        if self.selector == "random":
            return Random(seed=self.selection_seed)
        raise UserError(
            'selector="gradient" needs calibration batches: get_lift_model(model, config, '
            "calibration=batches)."
        )

    @property
    def selection_tile_bytes(self) -> int:
        """`selection_tile_mib` in bytes."""
        return self.selection_tile_mib * 2**20

    def count(self, shape: tuple[int, int], name: str = "a target") -> int:
        """k for a matrix of this shape.

        Raises:
            UserError: the budget selects nothing, or more than there is.
        """
        own = next(
            (d for p, d in self.density_pattern.items() if re.match(_whole_name(p), name)), None
        )
        if own is not None:
            budget, count = f"density_pattern={own}", count_by_density(shape, own)
        elif self.rank_budget is not None:
            budget, count = (
                f"rank_budget={self.rank_budget}",
                count_by_rank(shape, self.rank_budget),
            )
        else:
            budget, count = f"density={self.density}", count_by_density(shape, self.density)
        if any(side % self.block for side in shape):
            raise MaskError(
                f"{name} is {shape[0]}x{shape[1]}, which blocks of {self.block}x{self.block} do "
                "not divide: use block=1."
            )
        count -= count % self.block**2
        if not 1 <= count <= shape[0] * shape[1]:
            raise MaskError(
                f"{budget} selects {count} entries of {name} ({shape[0]}x{shape[1]}); "
                f"expected 1 to {shape[0] * shape[1]}."
            )
        return count

    def check_patterns(self, targets: Iterable[str]) -> None:
        """Refuse a density of its own for something that is not trained.

        Raises:
            UserError: a pattern that matches none of the targets.
        """
        names = list(targets)
        for pattern in self.density_pattern:
            if not any(re.match(_whole_name(pattern), name) for name in names):
                raise MaskError(
                    f"the density_pattern {pattern!r:.200} matches none of the {len(names)} "
                    "modules that are trained: leave it out, or see target_modules."
                )

    def retired_bound(self, count: int) -> int | None:
        """Entries that may be retired in a matrix with `count` trained ones; None: no bound."""
        return None if self.retired_limit is None else int(self.retired_limit * count)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> LiftConfig:
        """Back from `to_dict`.

        Raises:
            UserError: a key that this version does not know, or a value that no config can have.
        """
        if not isinstance(data, dict):
            raise UserError(f"expected the keys of a LiftConfig, got {data!r:.80}.")
        data = {FORMER_NAMES.get(key, key): value for key, value in data.items()}
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise UserError(
                f"unknown LiftConfig keys {unknown!s:.200}: expected some of {sorted(known)}; "
                "the adapter may come from a newer leanlift."
            )
        return cls(**data)


def _whole_name(pattern: str) -> str:
    """A regular expression for whole names that end as `pattern` says, at a dot."""
    return rf"(?:.*\.)?(?:{pattern})$"


def _is_int(value: Any) -> bool:
    """One that torch can take as a seed, a size or a step: 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63


def _is_number(value: Any) -> bool:
    return _is_int(value) or isinstance(value, float)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "density": ("a number", _is_number),
    "rank_budget": ("a whole number or none", lambda v: v is None or _is_int(v)),
    "approx_rank": ("a whole number", _is_int),
    "refresh_interval": ("a whole number", _is_int),
    "refresh_margin": ("a number", _is_number),
    "retired_limit": ("a number or none", lambda v: v is None or _is_number(v)),
    "selector": ("a name", _is_text),
    "block": ("a whole number", _is_int),
    "target_modules": (
        "a name or a list of names",
        lambda v: _is_text(v) or (isinstance(v, tuple) and all(map(_is_text, v))),
    ),
    "density_pattern": (
        "a mapping from patterns to numbers",
        lambda v: (
            isinstance(v, Mapping) and all(_is_text(k) and _is_number(d) for k, d in v.items())
        ),
    ),
    "values_dtype": ("a name", _is_text),
    "quantize_embeddings": ("true or false", lambda v: isinstance(v, bool)),
    "selection_seed": ("a whole number", _is_int),
    "selection_tile_mib": ("a whole number", _is_int),
}
"""What each field may hold, in words and as a test."""
