"""Planning a run from a model's configuration, with the training loss that it will have."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, masking_utils

from leanlift.config import LiftConfig
from leanlift.ends import LIKELIHOOD, Objective
from leanlift.errors import UserError, first_line
from leanlift.memory import MemoryPlan, StepSettings, plan_step
from leanlift.quantized import WeightFormat, dtype_of
from leanlift.training.arguments import LiftSFTConfig, RunArguments
from leanlift.training.base import stored_quantization
from leanlift.training.loss import loss_of_all_tokens, objective_of

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

    Raises:
        UserError: no such model, one without targets, or settings that cannot be planned.
    """
    config, settings = config or LiftConfig(), settings or StepSettings()
    try:
        shape: Any = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
        stored = stored_quantization(shape, str(model))
    except UserError:
        raise
    except Exception as error:  # a config.json may hold anything, and each class has its own checks
        raise UserError(f"the model {model} cannot be planned for: {first_line(error)}") from error
    if stored is not None:
        quantization = _stored_format(stored, settings.dtype)
        del shape.quantization_config

    def build() -> Any:
        dtype = dtype_of(settings.dtype)
        try:
            return AutoModelForCausalLM.from_config(
                shape,
                dtype=dtype,
                attn_implementation=attn_implementation,
                trust_remote_code=trust_remote_code,
            )
        except Exception as error:
            raise UserError(
                f"the model {model} cannot be planned for: {first_line(error)}"
            ) from error

    loss = partial(loss_of_all_tokens, objective=objective)
    with without_packing_search():
        return plan_step(build, str(model), config, quantization, settings, loss)


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


def plan_of(args: RunArguments, sft: LiftSFTConfig, cuda: bool = True) -> MemoryPlan:
    """The plan of a run that `leanlift train` would make with these arguments."""
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    settings = StepSettings(
        batch=sft.per_device_train_batch_size,
        length=sft.max_length or 2048,
        dtype=dtype,
        checkpointing=bool(sft.gradient_checkpointing),
        accumulate=sft.gradient_accumulation_steps,
        optim=_value(sft.optim),
        in_backward=sft.optim_in_backward,
        offload=bool(sft.activation_offloading),
        embedding_on_cpu=args.embedding_on_cpu,
        cuda=cuda,
        eval_batch=sft.per_device_eval_batch_size if _evaluates(args, sft) else 0,
    )
    plan = plan_memory(
        args.model_name_or_path,
        args.lift_config(),
        settings,
        format_of(args, dtype),
        args.attn_implementation,
        bool(sft.trust_remote_code),
        objective_of(sft),
        args.model_revision,
    )
    template = sft.chat_template_path
    if template is not None and not Path(template).expanduser().is_file():
        plan.notes.append(
            "rows that the embedding may get for tokens of chat_template_path are not counted."
        )
    return plan


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
