"""Which part of a model gives the hidden states that its head takes.

Most ask their base for them. Some ask the one decoder in it, which gives what the base would have
given.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from leanlift.model.resize_embeddings import embedding_size
from leanlift.model.state import lifted


def base_of(model: Any) -> Any:
    """The model without its head. Where transformers says that this is the model itself, since its
    family calls it by another name than its class says, the one model in it."""
    model = lifted(model)
    base = model.base_model
    if base is not model:
        return base
    inner = [part for part in model.children() if hasattr(part, "get_input_embeddings")]
    return inner[0] if len(inner) == 1 else base


def few_ids(model: Any) -> Tensor:
    """Ids [2, 9] that any vocabulary has, and that stand for nothing else than text."""
    device, text = next(model.parameters()).device, model.config.get_text_config()
    sizes = embedding_size(model), getattr(text, "vocab_size", None)
    most = min(97, *(size for size in sizes if isinstance(size, int)))
    special = {
        value
        for name, value in (*vars(model.config).items(), *vars(text).items())
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int)
    }
    plain = [number for number in range(most) if number not in special] or [0]
    ids = [plain[(7 * place + 3) % len(plain)] for place in range(18)]
    return torch.tensor(ids, device=device).view(2, 9)


def is_base_of_its_part(model: Any) -> bool:
    """Whether a base gives what the one decoder in it gives: some models ask that alone."""
    states: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        if hasattr(output, "last_hidden_state"):
            states.append(output.last_hidden_state)

    base = base_of(model)
    handles = [part.register_forward_hook(keep) for part in base.modules()]
    try:
        base(input_ids=few_ids(model), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return len(states) == 2 and states[0] is states[1]
