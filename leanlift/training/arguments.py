"""The training loop as `leanlift train` and `LiftTrainer` take it: TRL's SFTConfig with other
defaults, from the paper. What a run is told beside the loop is `leanlift.run_arguments`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, simplefilter

import torch
from trl import SFTConfig

from leanlift.defaults import SPARSE_OPTIMIZERS
from leanlift.errors import UserError
from leanlift.methods import METHODS, SFT
from leanlift.run_arguments import RunArguments
from leanlift.settings import NUMBERS, SWITCH
from leanlift.training.checks import check_numbers

__all__ = ["LiftSFTConfig", "RunArguments"]


def trains_on_gpu(sft: Any) -> bool:
    """Whether a run with these arguments of the loop computes on a GPU."""
    return torch.cuda.is_available() and not sft.use_cpu


@dataclass
class LiftArguments:
    """The settings of the loop that are ours, or have another default here than TRL's, for every
    method: the paper's (arXiv 2506.00772, appendix).

    The paper's are: learning_rate (its MATH-10K runs on Llama-2-7B; 1e-4 and 5e-5 elsewhere),
    adam_beta2, adam_epsilon, no weight decay, linear decay after 3 % warm-up. In the miniatures of
    `benchmarks/quality`, β2 = 0.999 and 10 % warm-up change what is learned by less than the seeds
    do, and principal weights take a third of the learning rate that LoRA, magnitude and random
    masks do best at; on SmolLM2-135M, in 32 steps, all of them do best at 2e-3 to 3e-3.
    max_nonfinite_steps is our choice. All else is TRL's.
    """

    output_dir: str | None = field(
        default="leanlift-output", metadata={"help": "adapter, checkpoints and reports"}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "peak learning rate"})
    adam_beta2: float = field(default=0.95, metadata={"help": "decay of the second moment"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of Adam"})
    optim: str = field(
        default="adamw_torch",
        metadata={
            "help": "or sparse_adamw, adamw_torch, adamw_8bit, …. State of 8 bits where the name "
            "says so, else fp32; the sparse ones, which are leanlift's, also train bfloat16 values"
        },
    )
    optim_in_backward: bool = field(
        default=False,
        metadata={
            "help": "update each matrix at once; max_grad_norm 0. As soon as its gradient exists, "
            "which is freed then; needs a sparse_adamw optim"
        },
    )
    kept_blocks: int = field(
        default=0,
        metadata={
            "help": "the last blocks that are not recomputed, a number. With "
            "gradient_checkpointing: they keep their activations, which takes memory and saves time"
        },
    )
    reuse_weights: bool = field(
        default=False,
        metadata={
            "help": "make weights once for recomputation and gradients. With "
            "gradient_checkpointing: those of a block wait for its backward pass, which takes "
            "memory and saves time"
        },
    )
    scale_learning_rates: bool = field(
        default=False,
        metadata={
            "help": "a matrix's learning rate goes with the size of its weights. With their root "
            "mean square: keeps more of what the base could do, learns a little less"
        },
    )
    max_nonfinite_steps: int = field(
        default=3,
        metadata={
            "help": "bad steps in a row that end a run. A step with a NaN or infinite loss or "
            "gradient is not applied"
        },
    )
    warmup_steps: float = field(
        default=0.03, metadata={"help": "below 1: a share of all steps. Steps of warm-up"}
    )
    use_cpu: bool = field(default=False, metadata={"help": "also beside a GPU. Trains on the CPU"})
    bf16: bool | None = field(
        default=None,
        metadata={"help": "bf16 autocast; default: on a GPU. Unless fp16 is set"},
    )
    report_to: None | str | list[str] = field(  # noqa: RUF036 - as HfArgumentParser wants it
        default="none", metadata={"help": "such as tensorboard or wandb. Where Trainer logs to"}
    )

    if TYPE_CHECKING:
        gradient_accumulation_steps: int = 1
        gradient_checkpointing: bool = True
        max_grad_norm: float = 1.0
        fp16: bool = False

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
        SWITCH.check("use_cpu", self.use_cpu)  # any text would be true
        for name in ("resume_from_checkpoint", "chat_template_path"):
            given = getattr(self, name, None)
            if isinstance(given, str) and given.startswith("~"):
                setattr(self, name, os.path.expanduser(given))
        if self.use_cpu or not torch.cuda.is_available():
            self.use_cpu = True
            self.bf16 = False if self.bf16 is None else self.bf16
        own = self.optim if self.optim in SPARSE_OPTIMIZERS else None
        if own:
            self.optim = "adamw_torch"
        super().__post_init__()  # type: ignore[misc]
        if own:
            self.optim = own
        if self.kept_blocks and not self.gradient_checkpointing:
            raise UserError(
                "kept_blocks are blocks that gradient_checkpointing does not recompute, and it is "
                "off, so all are kept: leave kept_blocks out."
            )
        SWITCH.check("reuse_weights", self.reuse_weights)
        SWITCH.check("scale_learning_rates", self.scale_learning_rates)
        if self.reuse_weights and not self.gradient_checkpointing:
            raise UserError(
                "reuse_weights is about weights that gradient_checkpointing makes to recompute a "
                "block, and it is off, so none are: leave reuse_weights out."
            )
        if self.optim_in_backward:
            self._check_in_backward(own)

    def _check_in_backward(self, own: str | None) -> None:
        excluded = {
            f"optim={getattr(self.optim, 'value', self.optim)}": own is None,
            f"max_grad_norm={self.max_grad_norm}": bool(self.max_grad_norm),
            "fp16=True": self.fp16,
        }
        found = [setting for setting, clashes in excluded.items() if clashes]
        if found:
            raise UserError(
                "optim_in_backward updates a matrix before the other gradients exist, so it "
                f"cannot go with {' and '.join(found)}: set optim=sparse_adamw or "
                "sparse_adamw_8bit, max_grad_norm=0 and no fp16."
            )


@dataclass
class LiftSFTConfig(LiftArguments, SFTConfig):
    """SFTConfig with the paper's training settings as defaults (arXiv 2506.00772, appendix).

    The paper's are: learning_rate (its MATH-10K runs on Llama-2-7B; 1e-4 and 5e-5 elsewhere),
    adam_beta2, adam_epsilon, no weight decay, linear decay after 3 % warm-up. `optim`,
    `optim_in_backward` and `max_nonfinite_steps` are leanlift's. All else is TRL's.
    """


@cache
def loop_class(method: str) -> Any:
    """The class of a method's settings of the loop: TRL's, with ours."""
    if method == SFT:
        return LiftSFTConfig
    found = METHODS[method]
    module = f"trl.{found.config_file.removesuffix('.py').replace('/', '.')}"
    with experimental_without_a_word():
        theirs = getattr(import_module(module), found.config)
    rate = field(default=found.learning_rate, metadata={"help": "peak learning rate"})
    return make_dataclass(
        f"Lift{found.config}",
        [("learning_rate", float, rate)],
        bases=(LiftArguments, theirs),
        namespace={"__doc__": f"{found.config} of TRL's, with leanlift's settings."},
    )


@contextmanager
def experimental_without_a_word() -> Iterator[None]:
    """TRL warns wherever something of `trl.experimental` is imported."""
    with catch_warnings():
        simplefilter("ignore")
        yield


def planned_loop(args: RunArguments, loop: Any, longest: int | None = None) -> LiftSFTConfig:
    """The loop of a run as one of supervised training that has the same steps: what a plan takes.

    Args:
        args, loop: of the run.
        longest: tokens of the longest row, where they are known; else as many as settings allow.
    """
    if isinstance(loop, LiftSFTConfig):
        return loop
    method = METHODS[args.method]
    common = {each.name for each in fields(LiftArguments)} | {
        "gradient_checkpointing", "gradient_checkpointing_kwargs", "gradient_accumulation_steps",
        "per_device_train_batch_size", "per_device_eval_batch_size", "max_steps", "max_grad_norm",
        "num_train_epochs", "eval_strategy", "trust_remote_code", "fp16", "bf16", "seed",
        "save_strategy", "save_steps", "save_total_limit", "activation_offloading",
    }  # fmt: skip
    given = {name: getattr(loop, name) for name in common if hasattr(loop, name)}
    length = getattr(loop, "max_length", None)
    if method.generates:
        prompt = longest if longest is not None else 512
        length = prompt + loop.max_completion_length
    elif longest is not None:
        length = longest if length is None else min(length, longest)
    return LiftSFTConfig(
        **{
            **given,
            "per_device_train_batch_size": method.rows * loop.per_device_train_batch_size,
            "per_device_eval_batch_size": method.rows * loop.per_device_eval_batch_size,
            "max_length": length,
        }
    )
