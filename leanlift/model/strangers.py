"""What others do to an attached model: save it, load tensors into it, train it, copy it.

torch, transformers and their trainers take it for an ordinary model. Where what they would do is
silently wrong, it is refused here:

* `save_pretrained` would write packed weights without saying how they are packed;
* new rows of an embedding would be in no adapter;
* a training loop that knows nothing of leanlift would never choose the mask again, and round
  small updates of bf16 values away.

Everything that is hung onto the model is a function of this module and can be pickled with it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from leanlift.config import LiftConfig
from leanlift.errors import UserError
from leanlift.model.resize_embeddings import embedding_size
from leanlift.model.state import every_layer, lift_state


def own_base(model: nn.Module) -> None:
    """Drop the marks of a quantized model: HF Trainer would refuse it, TRL would cast its
    trainable parameters to bf16, `save_pretrained` would write a quantization_config."""
    holder: Any = model
    for mark, unset in (
        ("is_quantized", False),
        ("is_loaded_in_4bit", False),
        ("is_loaded_in_8bit", False),
        ("hf_quantizer", None),
        ("quantization_method", None),
    ):
        if getattr(model, mark, None):
            setattr(holder, mark, unset)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def guard(model: nn.Module) -> None:
    """Hang the refusals onto an attached model; `unguard` takes them off."""
    holder: Any = model
    holder.save_pretrained = partial(_refuse_save, type(model).__name__)
    holder.push_to_hub = partial(_refuse_save, type(model).__name__)
    holder.resize_token_embeddings = partial(_resize, model)
    holder.tie_weights = _stay_tied
    model.register_forward_pre_hook(_check_trainer)


def unguard(model: nn.Module) -> None:
    """Let others do with a model what they would."""
    for name in ("save_pretrained", "push_to_hub", "resize_token_embeddings", "tie_weights"):
        vars(model).pop(name, None)
    hooks = model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _check_trainer]:
        del hooks[key]


def claim(model: nn.Module) -> None:
    """Say that whoever trains `model` refreshes its mask as its config says, and rounds bf16
    values as `SparseAdamW` does. LiftTrainer says so itself; a loop of one's own may."""
    lift_state(model).claimed = True


def release(model: nn.Module) -> None:
    """Take back what `claim` said: the next one who trains `model` has to say it again."""
    lift_state(model).claimed = False


def _refuse_save(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UserError(
        f"this {kind} has leanlift layers, and save_pretrained would write its frozen weights in "
        "a form that nothing loads again: save what was trained with save_adapter(model, "
        "directory), or give the trainer what get_lift_model returned; make a checkpoint of it "
        "with merge_adapter."
    )


def _resize(model: Any, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    have = embedding_size(model)
    if new_num_tokens not in (None, have):
        raise UserError(
            f"the embedding of this model has {have} rows, and others would be lost with its "
            "adapter: attach it with embedding_rows=len(tokenizer), and train them with "
            "trainable_token_indices."
        )
    return model.get_input_embeddings()


def _stay_tied(*args: Any, **kwargs: Any) -> None:
    """What is tied is tied by the layers that are there."""


def _check_trainer(model: Any, *rest: Any) -> None:
    """At a forward pass that will be trained on."""
    state = model.leanlift
    if not (torch.is_grad_enabled() and model.training):
        return
    layers = every_layer(model).values() if state.holds_merged else ()
    if any(layer.merged is not None for layer in layers):
        raise UserError(
            "merge_adapter keeps the merged weights of this model, and nothing of them is trained: "
            "call unmerge_adapter first."
        )
    if state.claimed:
        return
    clashes = _needs(state.config)
    if clashes:
        raise UserError(
            f"{' and '.join(clashes)} by LiftTrainer or LiftCallback alone: train with it, give "
            "your trainer callbacks=[LiftCallback()], or use refresh_interval=0 and "
            "values_dtype=float32; a loop that does both itself says so with "
            "leanlift.model.claim(model)."
        )


def _needs(config: LiftConfig) -> list[str]:
    needs = []
    if config.refresh_interval:
        needs.append(f"the mask is chosen again every {config.refresh_interval} steps")
    if config.values_dtype != "float32":
        needs.append(f"small updates of {config.values_dtype} values are kept")
    return needs
