"""What a run is told beside the training loop: base, rows, what is trained, where to merge.

Declared once, as in `leanlift.config`, whose settings it has as they are; names as the ecosystem
has them. Nothing heavy is imported, so that the command line can look at all of it at once. The
loop itself is `leanlift.training.LiftSFTConfig`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import Any

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.methods import METHOD_NAMES, SFT
from leanlift.rows.mixture import Part, parts_of
from leanlift.settings import (
    AT_LEAST_1,
    EXCLUDED,
    NOT_TAKEN,
    SWITCH,
    TEXT,
    Kind,
    about,
    kind_of,
    one_of,
    optional,
    whole,
)

DTYPES = ("bfloat16", "float16", "float32")


def _places(given: Any) -> tuple[dict[str, Any], ...]:
    """Mappings as a file of settings has them, or as JSON; a text alone is a path."""
    listed = given if isinstance(given, (list, tuple)) else [given] if given else []
    read = [_mapping(each) for each in listed if each not in ("none", "null")]
    if not all(isinstance(each, Mapping) for each in read):
        raise TypeError
    return tuple(dict(each) for each in read)


def _mapping(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return json.loads(given) if given.lstrip().startswith("{") else {"path": given}


DATASETS = Kind(
    'files or hub names, or mappings such as {"path": "a.jsonl", "fraction": 0.7}',
    lambda v: isinstance(v, tuple) and all(isinstance(each, Mapping) for each in v),
    _places,
    many=True,
)
FUNCTION = Kind(
    "a function as module:function",
    lambda v: isinstance(v, str) and re.fullmatch(r"[^\W\d][\w.]*[:.][^\W\d]\w*", v) is not None,
    TEXT.take,
)


@dataclass(frozen=True)
class BaseAndRows:
    """What is trained on what; the beginning of `RunArguments`."""

    model_name_or_path: str = field(
        metadata=about(
            TEXT,
            "the base: a directory or a hub name. A checkpoint in 16 bits, or quantized by "
            "bitsandbytes.",
        )
    )
    dataset_name: str = field(
        default="",
        metadata=about(
            TEXT,
            "a file (.json .jsonl .csv .tsv .parquet) or hub name. Training rows, with the columns "
            "messages | conversations | prompt, completion | instruction, input, output | text.",
        ),
    )
    dataset_split: str = field(
        default="train", metadata=about(TEXT, "split of a hub dataset, or train[:100] of a file.")
    )
    datasets: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata=about(
            DATASETS,
            "several of them, in place of dataset_name. In a file of settings a list of path, "
            "name, split, columns and fraction (the share of the mixture), as TRL has it.",
        ),
    )
    streaming: bool = field(
        default=False,
        metadata=about(
            SWITCH, "read training rows as they are asked for. In their order; needs max_steps."
        ),
    )
    formatting_func: str | None = field(
        default=None,
        metadata=about(
            optional(FUNCTION),
            "module:function that makes a text of a row. Of which everything is trained.",
        ),
    )
    eval_dataset_name: str | None = field(
        default=None, metadata=about(optional(TEXT), "rows to evaluate on, like dataset_name.")
    )
    eval_dataset_split: str = field(
        default="test", metadata=about(TEXT, "split of a hub dataset to evaluate on.")
    )
    keep_dataset_name: tuple[Mapping[str, Any], ...] = field(
        default=(),
        metadata=about(
            DATASETS,
            "rows or texts (.txt .md) not to forget. The loss on each is measured before the first "
            "step and after the last; files, or mappings of path, name, split and columns as in "
            "datasets.",
        ),
    )
    model_revision: str | None = field(
        default=None,
        metadata=about(
            optional(TEXT), "branch, tag or commit of a base on the hub. The adapter keeps it."
        ),
    )
    load_in_4bit: bool = field(
        default=True, metadata=about(SWITCH, "hold the base in 4 bits (the default).")
    )
    load_in_8bit: bool = field(
        default=False, metadata=about(SWITCH, "hold the base in INT8 instead.")
    )
    bnb_4bit_quant_type: str = field(
        default="nf4", metadata=about(one_of("nf4", "fp4"), "nf4 or fp4.")
    )
    bnb_4bit_use_double_quant: bool = field(
        default=True,
        metadata=about(SWITCH, "quantize scales too. Those of the 4-bit weights."),
    )
    dtype: str | None = field(
        default=None,
        metadata=about(
            optional(one_of(*DTYPES)),
            "dtype of the rest; default bfloat16, on a CPU float32. Of everything that is not "
            "quantized: bfloat16, float16 or float32.",
        ),
    )
    attn_implementation: str | None = field(
        default=None,
        metadata=about(optional(TEXT), "sdpa or flash_attention_2, as in from_pretrained."),
    )


@dataclass(frozen=True)
class RunArguments(LiftConfig, BaseAndRows):
    """The base, the data and the mask of a run.

    Its fields are those of `BaseAndRows`, of `LiftConfig`, and the following.

    Raises:
        UserError: a value that a setting cannot have.
    """

    method: str = field(
        default=SFT,
        metadata=about(
            one_of(*METHOD_NAMES),
            f"{', '.join(METHOD_NAMES[:-1])} or {METHOD_NAMES[-1]}. What rows are trained on by: "
            "imitated (sft), preferred (dpo, kto, orpo, cpo), rewarded (grpo, rloo), or a reward "
            "model of them (reward). The settings of TRL's trainer for it are settings too.",
        ),
    )
    reward_funcs: tuple[str, ...] = field(
        default=(),
        metadata=about(
            EXCLUDED,
            "module:function, for grpo and rloo. What rewards completions, as TRL's trainers take "
            "it; imported from the current directory or from what is installed.",
        ),
    )
    calibration_rows: int = field(
        default=32,
        metadata=about(
            AT_LEAST_1,
            "rows that selector=gradient looks at. Training rows to accumulate gradients over.",
        ),
    )
    embedding_on_cpu: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "keep the embedding in the CPU's memory. Not where it is tied to the head.",
        ),
    )
    stream_base: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "keep the frozen blocks in the host's memory. Two of them are on the card at a time, "
            "and each is copied while the one before it computes.",
        ),
    )
    stream_state: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "keep what is learned there too. Positions, offsets and moments come with their "
            "block; needs stream_base and optim_in_backward.",
        ),
    )
    tiled_mlp: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "MLPs go over the tokens of long rows in pieces. Less memory for activations, and "
            "weights that are made more often.",
        ),
    )
    mlp_tokens: int | None = field(
        default=None,
        metadata=about(
            optional(whole("64 or more", lambda value: value >= 64)),
            "tokens of such a piece, at most. Without it a quarter of a row, 2,048 to 4,096: more "
            "takes memory and saves time.",
        ),
    )
    fused_elementwise: bool = field(
        default=False,
        metadata=about(
            SWITCH,
            "norms, rotary embedding and gated products by Liger's kernels. On CUDA; faster, with "
            "less kept, equal within rounding; needs leanlift[liger].",
        ),
    )
    ops: str = field(
        default="auto",
        metadata=about(
            one_of("auto", "torch", "triton"),
            "triton, torch, or auto. What computes in the layers: Triton's kernels, torch, or "
            "Triton on CUDA where it can be imported.",
        ),
    )
    snapshot: bool = field(
        default=False,
        metadata=about(SWITCH, "keep torch's memory timeline, on CUDA. As memory_snapshot.pickle."),
    )
    merged_dir: str | None = field(
        default=None,
        metadata=about(
            optional(TEXT), "also write the merged fp16 checkpoint there. After training."
        ),
    )
    merge_onto: str = field(
        default="original",
        metadata=about(
            one_of("original", "quantized"),
            "original, or quantized: exactly what was trained. Original: the 16-bit checkpoint.",
        ),
    )
    log_format: str = field(
        default="auto",
        metadata=about(
            one_of("auto", "rich", "plain", "json"),
            "auto, rich, plain or json. What a run shows: rich (a live panel), plain (lines), "
            "json (an object per line), or auto: rich on a terminal, else plain.",
        ),
    )

    def __post_init__(self) -> None:
        """Take targets and densities as a command line has them, too, and expand `~` in paths: a
        shell does not after `=` or in a file."""
        for each in fields(self):
            given = getattr(self, each.name)
            if each.name in TAKEN:
                with suppress(*NOT_TAKEN):  # what cannot be taken is refused below
                    object.__setattr__(self, each.name, kind_of(each).take(given))
            elif each.name in PATHS and isinstance(given, str) and given.startswith("~"):
                object.__setattr__(self, each.name, os.path.expanduser(given))
        super().__post_init__()
        self.parts()
        self.kept_parts()
        if self.mlp_tokens and not self.tiled_mlp:
            raise UserError(
                "mlp_tokens are those of a piece where tiled_mlp is on, which it is not: set both, "
                "or leave mlp_tokens out."
            )
        if self.embedding_on_cpu and self.trainable_token_indices:
            raise UserError(
                "embedding_on_cpu keeps an embedding where none of it is trained: leave it out, or "
                "trainable_token_indices."
            )

    def parts(self) -> tuple[Part, ...]:
        """The places of the training rows.

        Raises:
            UserError: `datasets` that are none, or that are there beside dataset_name.
        """
        if self.datasets and self.dataset_name:
            raise UserError("datasets take the place of dataset_name: give one of them.")
        named = ({"path": self.dataset_name, "split": self.dataset_split},)
        return parts_of(self.datasets or (named if self.dataset_name else ()))

    def kept_parts(self) -> tuple[Part, ...]:
        """The places of the rows that are to be kept, each for itself.

        Raises:
            UserError: places that are none, one that is named twice, or a share, of which there is
                nothing.
        """
        found = parts_of(self.keep_dataset_name, "keep_dataset_name")
        if any(part.fraction is not None for part in found):
            raise UserError("keep_dataset_name mixes nothing: leave fraction out.")
        paths = [part.path for part in found]
        twice = next((path for path in paths if paths.count(path) > 1), None)
        if twice is not None:
            raise UserError(f"keep_dataset_name has {twice} twice: name it once.")
        return found

    def lift_config(self) -> LiftConfig:
        """The settings of the mask alone."""
        return LiftConfig(**{each.name: getattr(self, each.name) for each in fields(LiftConfig)})


TAKEN = (
    "target_modules", "exclude_modules", "modules_to_save", "trainable_token_indices",
    "density_pattern", "datasets", "keep_dataset_name", "reward_funcs",
)  # fmt: skip
"""Settings that a command line has in another form."""

PATHS = ("model_name_or_path", "dataset_name", "eval_dataset_name", "merged_dir")
