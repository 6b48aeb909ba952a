"""What others do to an attached model: save it, load tensors into it, train it, copy it.

torch, transformers and their trainers take it for an ordinary model. Where what they would do is
silently wrong, it is refused here:

* `save_pretrained` would write packed weights without saying how they are packed;
* `load_state_dict` would put values at other positions than they were learned at: the positions
  have a digest in the state dict, and are compared before anything is copied;
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
from leanlift.layers import LiftLinear

EXTRA = "_extra_state"  # as torch calls it


def guard(model: nn.Module) -> None:
    """Hang the refusals onto an attached model."""
    holder: Any = model
    holder.save_pretrained = partial(_refuse_save, type(model).__name__)
    holder.push_to_hub = partial(_refuse_save, type(model).__name__)
    model._register_load_state_dict_pre_hook(_check_positions, with_module=True)
    model.register_forward_pre_hook(_check_trainer)


def claim(model: nn.Module) -> None:
    """Say that whoever trains `model` refreshes its mask as its config says, and rounds bf16
    values as `SparseAdamW` does. LiftTrainer says so itself; a loop of one's own may."""
    holder: Any = model
    holder.leanlift.claimed = True


def _refuse_save(kind: str, *args: Any, **kwargs: Any) -> None:
    raise UserError(
        f"this {kind} has leanlift layers, and save_pretrained would write its frozen weights in "
        "a form that nothing loads again: save what was trained with save_adapter(model, "
        "directory), and make a checkpoint of it with merge_adapter."
    )


def _check_positions(model: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
    """Before anything is copied: the values belong to the positions that are trained here."""
    for name, layer in model.named_modules():
        key = f"{prefix}{name}.{EXTRA}"
        if not isinstance(layer, LiftLinear) or key not in state_dict:
            continue
        saved, own = state_dict[key], layer.get_extra_state()
        if not isinstance(saved, torch.Tensor) or not torch.equal(saved.cpu(), own):
            raise UserError(
                f"the tensors for {name} were learned at other positions than this model trains: a "
                "state dict has no place for positions, so use save_adapter and load_adapter."
            )


def _check_trainer(model: Any, *rest: Any) -> None:
    """At a forward pass that will be trained on."""
    state = model.leanlift
    if state.claimed or not (torch.is_grad_enabled() and model.training):
        return
    clashes = _needs(state.config)
    if clashes:
        raise UserError(
            f"{' and '.join(clashes)} by LiftTrainer alone: train with it, or use "
            "refresh_interval=0 and values_dtype=float32; a loop that does both itself says so "
            "with leanlift.model.claim(model)."
        )


def _needs(config: LiftConfig) -> list[str]:
    needs = []
    if config.refresh_interval:
        needs.append(f"the mask is chosen again every {config.refresh_interval} steps")
    if config.values_dtype != "float32":
        needs.append(f"small updates of {config.values_dtype} values are kept")
    return needs
