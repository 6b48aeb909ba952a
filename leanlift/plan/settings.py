"""The settings that decide what a run needs, under the names and with the defaults of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from leanlift.defaults import default_dtype
from leanlift.plan.batch import Batch, largest_batch
from leanlift.run_arguments import RunArguments
from leanlift.weights.quantized import WeightFormat, dtype_of
from leanlift.weights.stored import requested_format


@dataclass(frozen=True)
class PlanSettings:
    """What decides the memory of a run, besides model and LiftConfig.

    Names, values and defaults are those of `LiftSFTConfig` and of `leanlift train`'s keys, so that
    a plan with defaults is the plan of a run with defaults, on this machine. (The commands
    `leanlift train` and `leanlift plan` have leaner defaults of their own: 8-bit moments, bf16
    offsets, one row at a time.)

    Attributes:
        per_device_train_batch_size, max_length: rows of a micro-batch, and tokens of a row;
            None: no limit, for which 2048 are planned.
        gradient_accumulation_steps: micro-batches per step.
        gradient_checkpointing: whether activations are recomputed.
        kept_blocks: of how many blocks they are not, the last ones.
        reuse_weights: whether weights made to recompute a block wait for its backward pass.
        activation_offloading: whether saved activations are moved to the CPU.
        optim: a name that Trainer knows, or one of ours.
        optim_in_backward: whether each gradient is freed as soon as it exists.
        eval_strategy: "no": nothing is evaluated.
        per_device_eval_batch_size: rows of a batch that is evaluated.
        load_in_4bit, load_in_8bit, bnb_4bit_quant_type, bnb_4bit_use_double_quant: how a 16-bit
            checkpoint is held. One that is quantized on disk is held as it is.
        dtype: name of the dtype of what is not quantized; None: bfloat16 on a GPU, else float32.
        embedding_on_cpu: whether the embedding is not on the card.
        stream_base: whether the frozen blocks are in the host's memory.
        stream_state: whether what is learned in them is there too.
        tiled_mlp, mlp_tokens: whether MLPs go over the tokens of long rows in pieces, and of how
            many at most; None: as `layers.tiled_mlp.pieces` has it.
        fused_elementwise: whether norms, rotary embeddings and gated products are Liger's.
        cuda: whether the run is on a GPU; None: if this machine has one.
        largest, largest_eval: the largest batch of training and of evaluation, where it is known;
            None: as large as the settings above allow.
    """

    # of the loop: TRL's and LiftSFTConfig's, to which a test holds them
    per_device_train_batch_size: int = 8
    max_length: int | None = 1024
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = True
    kept_blocks: int = 0
    reuse_weights: bool = False
    activation_offloading: bool = False
    optim: str = "adamw_torch"
    optim_in_backward: bool = False
    eval_strategy: str = "no"
    per_device_eval_batch_size: int = 8
    # of the base: as they are declared
    load_in_4bit: bool = RunArguments.load_in_4bit
    load_in_8bit: bool = RunArguments.load_in_8bit
    bnb_4bit_quant_type: str = RunArguments.bnb_4bit_quant_type
    bnb_4bit_use_double_quant: bool = RunArguments.bnb_4bit_use_double_quant
    dtype: str | None = RunArguments.dtype
    embedding_on_cpu: bool = RunArguments.embedding_on_cpu
    stream_base: bool = RunArguments.stream_base
    stream_state: bool = RunArguments.stream_state
    tiled_mlp: bool = RunArguments.tiled_mlp
    mlp_tokens: int | None = RunArguments.mlp_tokens
    fused_elementwise: bool = RunArguments.fused_elementwise
    cuda: bool | None = None
    largest: Batch | None = None
    largest_eval: Batch | None = None

    @property
    def accumulates(self) -> bool:
        """Whether a step has several micro-batches, whose gradients wait for the last one."""
        return self.gradient_accumulation_steps > 1

    @property
    def on_cuda(self) -> bool:
        """Whether the run is on a GPU."""
        return torch.cuda.is_available() if self.cuda is None else self.cuda

    @property
    def device_type(self) -> str:
        """Of the model: "cuda" or "cpu"."""
        return "cuda" if self.on_cuda else "cpu"

    @property
    def model_dtype(self) -> torch.dtype:
        """The dtype of what is not quantized.

        Raises:
            UserError: it is none that checkpoints have.
        """
        return dtype_of(self.dtype_name)

    @property
    def dtype_name(self) -> str:
        """Its name."""
        return self.dtype or default_dtype(self.on_cuda)

    @property
    def requested_format(self) -> WeightFormat:
        """How the Linears of a 16-bit checkpoint are held.

        Raises:
            UserError: a quantized form that bitsandbytes has not.
        """
        return requested_format(
            self.load_in_4bit,
            self.load_in_8bit,
            self.bnb_4bit_quant_type,
            self.bnb_4bit_use_double_quant,
            self.dtype_name,
        )

    @property
    def batch(self) -> Batch:
        """The largest micro-batch of a training step."""
        return self.largest or largest_batch(self.per_device_train_batch_size, self.max_length)

    @property
    def eval_batch(self) -> Batch | None:
        """The largest batch of an evaluation; None: there is none."""
        if self.eval_strategy == "no":
            return None
        return self.largest_eval or largest_batch(self.per_device_eval_batch_size, self.max_length)
