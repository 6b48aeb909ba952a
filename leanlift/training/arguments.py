"""What `leanlift train` can be told: names as the ecosystem has them, defaults from the paper.

Two dataclasses: `RunArguments` (base, data, what to train, where to merge) and `LiftSFTConfig`,
TRL's SFTConfig with other defaults, which holds everything about the training loop.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from leanlift.config import ALL_LINEAR, TARGET_PRESETS, LiftConfig
from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.numbers import NUMBERS
from leanlift.training.checks import check_numbers


@dataclass
class RunArguments:
    """The base, the data and the mask of a run."""

    model_name_or_path: str = field(
        metadata={
            "help": "the base: a checkpoint directory, 16-bit or quantized by bitsandbytes, or a "
            "hub name"
        }
    )
    dataset_name: str = field(
        metadata={
            "help": "training rows: a .json, .jsonl or .parquet file, or a hub name; columns "
            "messages | prompt, completion | instruction, input, output | text"
        }
    )
    dataset_split: str = field(
        default="train", metadata={"help": "split of a hub dataset to train on"}
    )
    eval_dataset_name: str | None = field(
        default=None, metadata={"help": "rows to evaluate on, like dataset_name"}
    )
    eval_dataset_split: str = field(
        default="test", metadata={"help": "split of a hub dataset to evaluate on"}
    )
    model_revision: str | None = field(
        default=None,
        metadata={"help": "branch, tag or commit of a base on the hub; the adapter keeps it"},
    )
    load_in_4bit: bool = field(
        default=True, metadata={"help": "hold the base in 4 bits (the default)"}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "hold the base in INT8 instead"})
    bnb_4bit_quant_type: str = field(default="nf4", metadata={"help": "nf4 or fp4"})
    bnb_4bit_use_double_quant: bool = field(
        default=True, metadata={"help": "quantize the scales of the 4-bit weights too"}
    )
    dtype: str | None = field(
        default=None,
        metadata={
            "help": "dtype of everything that is not quantized: bfloat16, float16 or float32; "
            "default bfloat16 on a GPU, float32 on a CPU"
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "as in from_pretrained, e.g. sdpa or flash_attention_2"}
    )
    density: float = field(
        default=LiftConfig.density,
        metadata={"help": "share of each target matrix that is trained"},
    )
    rank_budget: int | None = field(
        default=None,
        metadata={
            "help": "r: train r·(m+n) entries per matrix, as a rank-r LoRA; replaces density"
        },
    )
    approx_rank: int = field(
        default=LiftConfig.approx_rank,
        metadata={"help": "R: rank of the approximation whose largest entries are trained"},
    )
    refresh_interval: int = field(
        default=LiftConfig.refresh_interval,
        metadata={"help": "choose the mask again every so many steps; 0: never"},
    )
    refresh_margin: float = field(
        default=LiftConfig.refresh_margin,
        metadata={"help": "an entry is replaced only by one whose score is so much larger"},
    )
    retired_limit: float | None = field(
        default=LiftConfig.retired_limit,
        metadata={
            "help": "retired entries (let go by refreshes, offsets kept) per trained one, at most; "
            "a negative number: no bound"
        },
    )
    selector: str = field(
        default=LiftConfig.selector,
        metadata={"help": "principal, magnitude, random or gradient (see calibration_rows)"},
    )
    calibration_rows: int = field(
        default=32,
        metadata={"help": "with selector=gradient: training rows to accumulate gradients over"},
    )
    block: int = field(
        default=LiftConfig.block,
        metadata={"help": "b: take b x b blocks of principal weights whole; 1: single entries"},
    )
    target_modules: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={
            "help": "all-linear, attention, mlp, or endings of module names, e.g. q_proj v_proj"
        },
    )
    density_pattern: str | None = field(
        default=None,
        metadata={
            "help": "densities of their own, by a regular expression for the end of a module's "
            """name: '{"down_proj": 0.1}', or a mapping in the YAML file"""
        },
    )
    values_dtype: str = field(
        default=LiftConfig.values_dtype,
        metadata={
            "help": "dtype of the trained offsets: float32, or bfloat16 with a sparse_adamw optim"
        },
    )
    quantize_embeddings: bool = field(
        default=LiftConfig.quantize_embeddings,
        metadata={"help": "hold the embedding and the output head in INT8 too"},
    )
    embedding_on_cpu: bool = field(
        default=False,
        metadata={"help": "keep the embedding in the CPU's memory; not where it is tied"},
    )
    selection_seed: int = field(
        default=LiftConfig.selection_seed, metadata={"help": "seed of the selection"}
    )
    selection_tile_mib: int = field(
        default=LiftConfig.selection_tile_mib,
        metadata={"help": "MiB of a matrix that the selection reads at once"},
    )
    ops: str = field(
        default="auto",
        metadata={
            "help": "what computes in the layers: triton (kernels), torch, or auto: Triton on "
            "CUDA where it can be imported"
        },
    )
    snapshot: bool = field(
        default=False,
        metadata={"help": "on CUDA, keep torch's own memory timeline as memory_snapshot.pickle"},
    )
    merged_dir: str | None = field(
        default=None,
        metadata={"help": "after training, also write the merged fp16 checkpoint there"},
    )
    merge_onto: str = field(
        default="original",
        metadata={
            "help": "original: offsets onto the 16-bit checkpoint; quantized: exactly the model "
            "that was trained"
        },
    )
    log_format: str = field(
        default="auto",
        metadata={
            "help": "what a run shows: rich (a live panel), plain (lines), json (an object per "
            "line), or auto: rich on a terminal, else plain"
        },
    )

    def __post_init__(self) -> None:
        """Expand `~` in paths: a shell does not after `=` or in a file."""
        for name in ("model_name_or_path", "dataset_name", "eval_dataset_name", "merged_dir"):
            given = getattr(self, name)
            if isinstance(given, str) and given.startswith("~"):
                setattr(self, name, os.path.expanduser(given))

    def lift_config(self) -> LiftConfig:
        """The LiftConfig these arguments describe.

        Raises:
            UserError: a value that makes no sense.
        """
        preset = len(self.target_modules) == 1 and self.target_modules[0] in TARGET_PRESETS
        return LiftConfig(
            density=self.density,
            rank_budget=self.rank_budget,
            approx_rank=self.approx_rank,
            refresh_interval=self.refresh_interval,
            refresh_margin=self.refresh_margin,
            retired_limit=None if _negative(self.retired_limit) else self.retired_limit,
            selector=self.selector,
            block=self.block,
            target_modules=self.target_modules[0] if preset else tuple(self.target_modules),
            density_pattern=self._densities(),
            values_dtype=self.values_dtype,
            quantize_embeddings=self.quantize_embeddings,
            selection_seed=self.selection_seed,
            selection_tile_mib=self.selection_tile_mib,
        )

    def _densities(self) -> dict[str, float]:
        """`density_pattern` as a mapping, whether it came as JSON or from YAML."""
        given: Any = self.density_pattern or {}
        try:
            parsed = json.loads(given) if isinstance(given, str) else dict(given)
            return {str(pattern): float(density) for pattern, density in parsed.items()}
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                'expected density_pattern as a mapping such as {"down_proj": 0.1}, '
                f"got {given!r}."
            ) from None


def _negative(limit: float | None) -> bool:
    return limit is not None and limit < 0


@dataclass
class LiftSFTConfig(SFTConfig):
    """SFTConfig with the paper's training settings as defaults (arXiv 2506.00772, appendix).

    The paper's are: learning_rate (its MATH-10K runs on Llama-2-7B; 1e-4 and 5e-5 elsewhere),
    adam_beta2, adam_epsilon, no weight decay, linear decay after 3 % warm-up. In the miniatures of
    `benchmarks/quality`, β2 = 0.999 and 10 % warm-up change what is learned by less than the seeds
    do, and principal weights take a third of the learning rate that LoRA, magnitude and random
    masks do best at. max_nonfinite_steps is our choice. All else is TRL's.
    """

    output_dir: str | None = field(
        default="leanlift-output", metadata={"help": "adapter, checkpoints and reports go there"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    adam_beta2: float = field(default=0.95, metadata={"help": "decay of the second moment"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of Adam"})
    optim: str = field(
        default="adamw_torch",
        metadata={
            "help": "adamw_torch or sparse_adamw (fp32 state), adamw_8bit, paged_adamw_8bit or "
            "sparse_adamw_8bit; the sparse ones also train bfloat16 values"
        },
    )
    optim_in_backward: bool = field(
        default=False,
        metadata={
            "help": "update each matrix as soon as its gradient exists, and free the gradient; "
            "needs a sparse_adamw optim, max_grad_norm 0 and no gradient accumulation"
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "a step with a NaN or infinite loss or gradient is not applied; after so many "
            "in a row training stops"
        },
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "warm-up in steps, or below 1 as a share of all steps"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "train on the CPU, also beside a GPU"})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast; default: on a GPU, unless fp16 is set"},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - as HfArgumentParser wants it
        default="none", metadata={"help": "where Trainer logs to, e.g. tensorboard or wandb"}
    )

    def __post_init__(self) -> None:
        """As TRL's, which only knows transformers' optimizers. Without a GPU the run is one on the
        CPU, and without bf16 autocast unless it is asked for.

        Raises:
            UserError: a number out of range, or settings that optim_in_backward cannot go with.
        """
        for name in NUMBERS:  # TRL takes a text for some of them
            given = getattr(self, name, None)
            if isinstance(given, str) and given.strip().isdecimal():
                setattr(self, name, int(given))
        check_numbers(self)
        for name in ("resume_from_checkpoint", "chat_template_path"):
            given = getattr(self, name)
            if isinstance(given, str) and given.startswith("~"):
                setattr(self, name, os.path.expanduser(given))
        if self.use_cpu or not torch.cuda.is_available():
            self.use_cpu = True
            self.bf16 = False if self.bf16 is None else self.bf16
        own = self.optim if self.optim in SPARSE_OPTIMIZERS else None
        if own:
            self.optim = "adamw_torch"
        super().__post_init__()
        if own:
            self.optim = own
        if self.optim_in_backward:
            self._check_in_backward(own)

    def _check_in_backward(self, own: str | None) -> None:
        excluded = {
            f"optim={getattr(self.optim, 'value', self.optim)}": own is None,
            f"gradient_accumulation_steps={self.gradient_accumulation_steps}": (
                self.gradient_accumulation_steps > 1
            ),
            f"max_grad_norm={self.max_grad_norm}": bool(self.max_grad_norm),
            "fp16=True": self.fp16,
        }
        found = [setting for setting, clashes in excluded.items() if clashes]
        if found:
            raise UserError(
                "optim_in_backward updates a matrix before the other gradients exist, so it "
                f"cannot go with {' and '.join(found)}: set optim=sparse_adamw or "
                "sparse_adamw_8bit, gradient_accumulation_steps=1, max_grad_norm=0 and no fp16."
            )
