"""Planning a run from a model's configuration, with the training loss that it will have."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from leanlift.config import LiftConfig
from leanlift.errors import UserError, first_line
from leanlift.format import size
from leanlift.layers.lm_head import LIKELIHOOD, Objective
from leanlift.plan import Known, MemoryPlan, StepSettings, least_nbytes, plan_step, shapes_of
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.base import stored_quantization
from leanlift.training.batches import Batch, Batches, largest_allowed
from leanlift.training.loss import loss_of_all_tokens, objective_of
from leanlift.weights.quantized import WeightFormat, dtype_of

logger = logging.getLogger("leanlift")

NF4 = WeightFormat("nf4", "bfloat16", 64, double=True)


def plan_memory(
    model: str | Path,
    config: LiftConfig | None = None,
    settings: StepSettings | None = None,
    quantization: WeightFormat | None = NF4,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    objective: Objective = LIKELIHOOD,
    revision: str | None = None,
    known: Known | None = None,
) -> MemoryPlan:
    """What fine-tuning a model will need, without its weights.

    Args:
        model: hub name, checkpoint directory, or a bare config.json.
        config: what is trained; `LiftConfig()` if not given.
        settings: the training step.
        quantization: how the Linears are held; None: in `settings.dtype`. A checkpoint that is
            quantized on disk is held as it is.
        attn_implementation, trust_remote_code, revision: as in `from_pretrained`.
        objective: what a token costs.
        known: of earlier plans for this model and objective: what has been run is not run again.

    Raises:
        UserError: no such model, one without targets, or settings that cannot be planned.
    """
    config, settings = config or LiftConfig(), settings or StepSettings()
    base = FakeBase.of(model, attn_implementation, trust_remote_code, revision)
    fmt = base.format(quantization, settings.dtype)
    loss = partial(loss_of_all_tokens, objective=objective)
    build = partial(base.build, settings.dtype)
    with without_packing_search():
        return plan_step(build, str(model), config, fmt, settings, loss, known)


@dataclass(frozen=True)
class FakeBase:
    """A base of which the configuration alone is known.

    Attributes:
        name: hub name or path.
        shape: its configuration.
        stored: how its checkpoint is quantized; None: not at all.
        attn_implementation, trust_remote_code: as in `from_pretrained`.
    """

    name: str
    shape: Any
    stored: dict[str, Any] | None
    attn_implementation: str | None
    trust_remote_code: bool

    @classmethod
    def of(
        cls,
        model: str | Path,
        attn_implementation: str | None = None,
        trust_remote_code: bool = False,
        revision: str | None = None,
    ) -> FakeBase:
        """As `plan_memory` takes and refuses it."""
        try:
            shape: Any = AutoConfig.from_pretrained(
                model, revision=revision, trust_remote_code=trust_remote_code
            )
            stored = stored_quantization(shape, str(model))
        except UserError:
            raise
        except Exception as error:  # a config.json may hold anything; each class has own checks
            raise _unplannable(str(model), error) from error
        if stored is not None:
            del shape.quantization_config
        return cls(str(model), shape, stored, attn_implementation, trust_remote_code)

    @property
    def tied(self) -> bool:
        """Whether embedding and output head are one tensor."""
        return bool(getattr(self.shape.get_text_config(), "tie_word_embeddings", False))

    def format(self, asked: WeightFormat | None, dtype: str) -> WeightFormat | None:
        """How the Linears are held: as asked for, or as they are stored."""
        return asked if self.stored is None else _stored_format(self.stored, dtype)

    def build(self, dtype: str) -> Any:
        """The 16/32-bit model, under fake tensors."""
        try:
            return AutoModelForCausalLM.from_config(
                self.shape,
                dtype=dtype_of(dtype),
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
            )
        except Exception as error:
            raise _unplannable(self.name, error) from error


def _unplannable(name: str, error: Exception) -> UserError:
    return UserError(f"the model {name} cannot be planned for: {first_line(error)}")


@contextmanager
def without_packing_search() -> Iterator[None]:
    """Without an attention mask transformers looks into the positions for packed sequences, and
    makes a whole mask where it cannot look, as under fake tensors; a real run makes none."""
    if not hasattr(masking_utils, "find_packed_sequence_indices"):
        yield
        return
    stock = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda *args, **kwargs: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = stock


def plan_of(
    args: RunArguments,
    sft: LiftSFTConfig,
    cuda: bool = True,
    batches: Batches | None = None,
    known: Known | None = None,
) -> MemoryPlan:
    """The plan of a run that `leanlift train` would make with these arguments.

    Args:
        args, sft: of the run.
        cuda: whether it is on a GPU.
        batches: its largest ones; what is None there is as large as the arguments allow.
        known: as in `plan_memory`.
    """
    settings = step_settings(args, sft, cuda, batches or Batches())
    plan = plan_memory(
        args.model_name_or_path,
        args.lift_config(),
        settings,
        format_of(args, settings.dtype),
        args.attn_implementation,
        bool(sft.trust_remote_code),
        objective_of(sft),
        args.model_revision,
        known,
    )
    template = sft.chat_template_path
    if template is not None and not Path(template).expanduser().is_file():
        plan.notes.append(
            "rows that the embedding may get for tokens of chat_template_path are not counted."
        )
    return plan


def least_of(args: RunArguments, sft: LiftSFTConfig, cuda: bool = True) -> tuple[int, str]:
    """What a run needs without its activations, in bytes, and when; see `least_nbytes`."""
    return least_nbytes(*_shaped(args, sft, cuda))


def targets_of(args: RunArguments, sft: LiftSFTConfig) -> dict[str, tuple[int, int]]:
    """The matrices that a run trains, and their shapes."""
    return shapes_of(*_shaped(args, sft, False)).targets


def _shaped(args: RunArguments, sft: LiftSFTConfig, cuda: bool) -> tuple[Any, ...]:
    """What a model's shapes follow from: (build, config, format, settings)."""
    settings = step_settings(args, sft, cuda, Batches())
    base = FakeBase.of(
        args.model_name_or_path,
        args.attn_implementation,
        bool(sft.trust_remote_code),
        args.model_revision,
    )
    fmt = base.format(format_of(args, settings.dtype), settings.dtype)
    return partial(base.build, settings.dtype), args.lift_config(), fmt, settings


def step_settings(
    args: RunArguments, sft: LiftSFTConfig, cuda: bool, batches: Batches
) -> StepSettings:
    """The training step of a run."""
    eval_packing = sft.packing if sft.eval_packing is None else sft.eval_packing
    train = batches.train or largest_allowed(sft.per_device_train_batch_size, sft, sft.packing)
    evaluation = batches.eval or largest_allowed(sft.per_device_eval_batch_size, sft, eval_packing)
    return StepSettings(
        batch=train.rows,
        length=train.tokens,
        trained=train.trained,
        padded=train.padded,
        dtype=args.dtype or ("bfloat16" if cuda else "float32"),
        checkpointing=bool(sft.gradient_checkpointing),
        accumulate=sft.gradient_accumulation_steps,
        optim=_value(sft.optim),
        in_backward=sft.optim_in_backward,
        offload=bool(sft.activation_offloading),
        embedding_on_cpu=args.embedding_on_cpu,
        cuda=cuda,
        eval_batch=evaluation.rows if _evaluates(args, sft) else 0,
        eval_length=evaluation.tokens,
        eval_trained=evaluation.trained,
        eval_padded=evaluation.padded,
    )


def plan_of_what_was_measured(
    args: RunArguments,
    sft: LiftSFTConfig,
    cuda: bool,
    plan: MemoryPlan,
    worst: Batches,
    largest: Batch | None,
) -> MemoryPlan:
    """The plan for the largest batch of the steps that were measured, and what it says of that.

    Args:
        args, sft, cuda: of the run.
        plan: the one that was made before it, for the batches `worst`.
        largest: the largest batch in what was measured; None: not known.
    """
    if largest is None or largest == worst.train:
        return plan
    try:
        made = plan_of(args, sft, cuda, Batches(largest, worst.eval))
    except Exception as error:  # whatever a model's own code does under fake tensors
        logger.warning("What was measured could not be planned: %s", first_line(error))
        return plan
    was = f"for {worst.train}, the largest batch that could occur," if worst.train else "before it"
    made.notes.append(
        f"planned: for {largest}, the largest batch among the steps measured; {was} the run was "
        f"planned to peak at {size(plan.peak)}."
    )
    return made


def _evaluates(args: RunArguments, sft: LiftSFTConfig) -> bool:
    """Rows to evaluate on are, before and after training, whatever the strategy."""
    return bool(args.eval_dataset_name) or _value(sft.eval_strategy) != "no"


def _value(choice: Any) -> str:
    """What an enum of transformers' says, or the name that was given."""
    return str(getattr(choice, "value", choice))


def _stored_format(stored: dict[str, Any], dtype: str) -> WeightFormat:
    """The format of a checkpoint that bitsandbytes has quantized, from its configuration."""
    if stored.get("load_in_8bit"):
        return WeightFormat("int8", "float32")
    kind = str(stored.get("bnb_4bit_quant_type") or "fp4")
    return WeightFormat(kind, dtype, 64, bool(stored.get("bnb_4bit_use_double_quant")))


def format_of(args: RunArguments, dtype: str) -> WeightFormat | None:
    """How the arguments have the Linears quantized."""
    if args.load_in_8bit:
        return WeightFormat("int8", "float32")
    if not args.load_in_4bit:
        return None
    return WeightFormat(args.bnb_4bit_quant_type, dtype, 64, args.bnb_4bit_use_double_quant)
