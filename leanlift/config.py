"""LiftConfig: what to train, and how the mask is chosen.

Each setting is declared once, here: its type, default, what it may be, and its help. The check of a
config, its docstring, the options of the command line and the keys of a YAML file are made of that
(`leanlift.settings`), so nothing heavy is imported before a mask is chosen.

A config is unpacked at the edge (`get_lift_model`) and never travels further down: the rooms
below take plain arguments.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from leanlift.errors import MaskError, UserError
from leanlift.settings import (
    ALL_LINEAR,
    AT_LEAST_1,
    DENSITIES,
    EXCLUDED,
    SHARE,
    SWITCH,
    TARGET_PRESETS,
    TARGETS,
    TOKENS,
    WHOLE,
    about,
    attributes,
    check_fields,
    number,
    one_of,
    optional,
    todays_names,
    whole,
)

if TYPE_CHECKING:
    from leanlift.selection import Scorer

__all__ = ["ALL_LINEAR", "TARGET_PRESETS", "LiftConfig"]

SELECTORS = ("principal", "magnitude", "random", "gradient")
VALUES_DTYPES = ("float32", "bfloat16")
MOST = 1e6  # times the trained entries: far beyond what any density leaves to retire
LIMIT = number(f"0 or more and at most {MOST:g}", lambda value: 0 <= value <= MOST)


@dataclass(frozen=True)
class LiftConfig:
    """How many entries of which matrices are trained, and how they are chosen.

    Where a default comes from stands with it; "measured" means `benchmarks/quality`, a miniature
    where no other base is named.
    """

    density: float = field(
        default=0.05,
        metadata=about(
            SHARE,
            "share of each matrix that is trained. k = ⌊density · m · n⌋ of its entries; 0.05 is "
            "about the budget of the paper's 7B runs (r = 128 is 0.0475 of Llama-2-7B). Measured, "
            "half of it learns less and twice as much no more.",
        ),
    )
    rank_budget: int | None = field(
        default=None,
        metadata=about(
            optional(AT_LEAST_1),
            "r·(m+n) entries a matrix, as a rank-r LoRA has. Takes the place of density.",
        ),
    )
    approx_rank: int = field(
        default=64,
        metadata=about(
            AT_LEAST_1,
            "rank of the approximation that ranks entries. Its largest entries are the principal "
            "weights. The paper's 7B runs take 64, half of r; measured, r is ahead of 1 and of "
            "8 r.",
        ),
    )
    refresh_interval: int = field(
        default=0,
        metadata=about(
            whole("0 (never) or more", lambda value: value >= 0),
            "choose anew every so many steps; 0: never. Optimizer steps between two selections "
            "from the current weights. The paper takes 10 to 2000, mostly 400. Measured, refreshes "
            "change what is learned by less than the seeds do and keep a little more of the "
            "source; 0 because retired entries take memory.",
        ),
    )
    refresh_margin: float = field(
        default=0.0,
        metadata=about(
            number("0 or more", lambda value: value >= 0),
            "how much better a newcomer must be. At a refresh the scores of active entries count "
            "1 + margin times. 0: the method as published; not measured.",
        ),
    )
    retired_limit: float | None = field(
        default=0.5,
        metadata=about(
            optional(LIMIT),
            "entries let go, per trained one; none: no bound. Entries that refreshes retire keep "
            "their offsets, in each matrix; at the bound a refresh admits fewer newcomers. 0.5 is "
            "our choice: the store then costs at most about a fifth of what the trained entries "
            "and their fp32 optimizer state do.",
        ),
    )
    selector: str = field(
        default="principal",
        metadata=about(
            one_of(*SELECTORS),
            "principal, magnitude, random or gradient. Principal is the method; gradient takes the "
            "largest accumulated gradients over a calibration set. The paper's ablation on "
            "Llama-2-7B has principal ahead of magnitude ahead of gradient. Measured on "
            "SmolLM2-135M, all but gradient learn as much; of 1 in 100, principal keeps less.",
        ),
    )
    block: int = field(
        default=1,
        metadata=about(
            AT_LEAST_1,
            "b: take b x b blocks whole. Above 1, with selector=principal (the paper's structured "
            "variant takes 4); k is rounded down to a multiple of b². 1, as in the paper's main "
            "runs.",
        ),
    )
    target_modules: str | tuple[str, ...] = field(
        default=ALL_LINEAR,
        metadata=about(
            TARGETS,
            "all-linear, attention, mlp, or names: q_proj v_proj. All-linear is every Linear "
            "inside the blocks, never embeddings, lm_head or norms, as in the paper; attention and "
            "mlp are those of them; names are endings of module names.",
        ),
    )
    exclude_modules: str | tuple[str, ...] = field(
        default=(),
        metadata=about(
            EXCLUDED,
            "names of modules that stay as they are: o_proj. Endings of module names, as in PEFT; "
            "of what target_modules covers, these and all in them are not trained.",
        ),
    )
    modules_to_save: str | tuple[str, ...] = field(
        default=(),
        metadata=about(
            EXCLUDED,
            "names of Linears that are trained whole: score. As in PEFT, inside the blocks or not: "
            "a classifier's or reward model's head; or lm_head, with logits that take more memory.",
        ),
    )
    trainable_token_indices: tuple[int, ...] = field(
        default=(),
        metadata=about(
            TOKENS,
            "ids of tokens whose rows are trained: 128011. As in PEFT: of the embedding, such as "
            "those of added tokens, and of a tied head, whose logits then take more memory.",
        ),
    )
    density_pattern: Mapping[str, float] = field(
        default_factory=dict,
        metadata=about(
            DENSITIES,
            """own densities: '{"down_proj": 0.1}'. As PEFT's rank_pattern has ranks: a regular """
            "expression for the end of a module's name, and its density. The first match counts, "
            "and takes precedence over density and rank_budget.",
        ),
    )
    values_dtype: str = field(
        default="float32",
        metadata=about(
            one_of(*VALUES_DTYPES),
            "dtype of the trained offsets. And of their gradients: float32, or bfloat16, which "
            "takes two bytes less each and needs an optimizer that rounds stochastically "
            "(sparse_adamw). fp32 in Python because any optimizer can train it.",
        ),
    )
    quantize_embeddings: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "embedding and output head in INT8. One scale per row; they are not trained, and an "
            "export onto the original has them in 16 bits. Off because the model is then the one "
            "that stock transformers loads.",
        ),
    )
    selection_seed: int = field(
        default=0,
        metadata=about(
            WHOLE, "seed of the selection. Start of the principal iteration, and the random mask."
        ),
    )
    selection_tile_mib: int = field(
        default=32,
        metadata=about(
            AT_LEAST_1,
            "MiB of a matrix that the selection reads at once. Changes memory, never the mask.",
        ),
    )

    def __post_init__(self) -> None:
        for each in fields(LiftConfig):
            if isinstance(getattr(self, each.name), list):
                object.__setattr__(self, each.name, tuple(getattr(self, each.name)))
        check_fields(self)
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        self._check_patterns()
        if self.block > 1 and self.selector != "principal":
            raise UserError(
                f"expected block=1, or more with selector=principal; got block={self.block} with "
                f"selector={self.selector}."
            )
        if self.selector == "gradient" and self.refresh_interval:
            raise UserError(
                "selector=gradient needs its calibration set for every selection: use "
                "refresh_interval=0 with it."
            )

    def _check_patterns(self) -> None:
        for pattern in self.density_pattern:
            try:
                re.compile(pattern)
                re.compile(_whole_name(pattern))  # in which it may not have flags of its own
            except (re.error, RecursionError, OverflowError) as error:
                raise UserError(
                    f"the density_pattern {pattern!r:.200} is no regular expression for the end "
                    f"of a name: {error}."
                ) from None

    def scorer(self) -> Scorer:
        """The selection object that `selector` names, for one that needs the weights alone.

        Raises:
            UserError: selector="gradient", which needs a calibration set.
        """
        from leanlift.selection import Magnitude, Principal, Random  # imports torch

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
        """How much of a matrix the selection reads at once."""
        return self.selection_tile_mib * 2**20

    def count(self, shape: tuple[int, int], name: str = "a target") -> int:
        """k for a matrix of this shape.

        Raises:
            UserError: the budget selects nothing, or more than there is.
        """
        if any(side % self.block for side in shape):
            raise MaskError(
                f"{name} is {shape[0]}x{shape[1]}, which blocks of {self.block}x{self.block} do "
                "not divide: use block=1."
            )
        budget, count = self._budget(shape, name)
        if not 1 <= count <= shape[0] * shape[1]:
            raise MaskError(
                f"{budget} selects {count} entries of {name} ({shape[0]}x{shape[1]}); "
                f"expected 1 to {shape[0] * shape[1]}."
            )
        return count

    def selects(self, shape: tuple[int, int], name: str) -> bool:
        """Whether the budget is one entry of a matrix at least, and no more than there are; of a
        very small one it may be neither."""
        return 1 <= self._budget(shape, name)[1] <= shape[0] * shape[1]

    def _budget(self, shape: tuple[int, int], name: str) -> tuple[str, int]:
        """What decides how many entries of a matrix are trained, and how many."""
        from leanlift.selection import count_by_density, count_by_rank  # imports torch

        own = next(
            (d for p, d in self.density_pattern.items() if re.match(_whole_name(p), name)), None
        )
        if own is not None:
            budget, count = f"density_pattern={own}", count_by_density(shape, own)
        elif self.rank_budget is not None:
            budget = f"rank_budget={self.rank_budget}"
            count = count_by_rank(shape, self.rank_budget)
        else:
            budget, count = f"density={self.density}", count_by_density(shape, self.density)
        return budget, count - count % self.block**2

    def check_patterns(self, targets: Iterable[str], whole: Iterable[str]) -> None:
        """Refuse a density of its own for something that is not trained, or is trained whole.

        Raises:
            UserError: a pattern that matches none of the targets but for those.
        """
        names = set(targets).difference(whole)
        for pattern in self.density_pattern:
            if not any(re.match(_whole_name(pattern), name) for name in names):
                raise MaskError(
                    f"the density_pattern {pattern!r:.200} matches none of the {len(names)} "
                    "modules of which a share is trained: see target_modules and modules_to_save."
                )

    def retired_bound(self, count: int) -> int | None:
        """Entries that may be retired in a matrix with `count` trained ones; None: no bound."""
        return None if self.retired_limit is None else int(self.retired_limit * count)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            each.name: dict(value) if isinstance(value, Mapping) else value
            for each in fields(LiftConfig)
            for value in [getattr(self, each.name)]
        }

    @classmethod
    def from_dict(cls, data: Any) -> LiftConfig:
        """Back from `to_dict`; keys of earlier releases are taken too.

        Raises:
            UserError: a key that this version does not know, or a value that no config can have.
        """
        if not isinstance(data, dict):
            raise UserError(f"expected the keys of a LiftConfig, got {data!r:.80}.")
        data = todays_names(data, "the config")
        known = sorted(field.name for field in fields(cls))
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise UserError(
                f"unknown LiftConfig keys {unknown!s:.200}: expected some of {known}; "
                "the adapter may come from a newer leanlift."
            )
        return cls(**data)


LiftConfig.__doc__ = f"{LiftConfig.__doc__ or ''}\n{attributes(LiftConfig)}"


def _whole_name(pattern: str) -> str:
    """A regular expression for whole names that end as `pattern` says, at a dot."""
    return rf"(?:.*\.)?(?:{pattern})$"
