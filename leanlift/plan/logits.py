"""What a planned model makes its logits of, which decides whether its loss is tiled.

A run measures it (`training.own_loss`); a plan has no numbers to measure. It follows the hidden
states through the operations of one forward pass instead: to the head, and from there to the
logits. Views, casts and factors on the way leave a tiled loss what it is, and so does a cap behind
the head; anything else does not.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from leanlift.layers.lm_head import Finish
from leanlift.model import output_head
from leanlift.model.hidden import base_of, few_ids, is_base_of_its_part
from leanlift.plan.blocks import first_block, in_part
from leanlift.plan.pieces import no_pieces

PLAIN = {"slice", "view", "_unsafe_view", "alias", "detach", "clone", "_to_copy", "unsqueeze",
         "squeeze", "mul", "mul_", "div", "div_", "copy_"}  # fmt: skip
"""Operations that keep numbers what they are but for a factor, where nothing but one number comes
from elsewhere."""

CAPS = {"tanh", "tanh_"}

SOME = 30.0
"""A cap: which number it is makes no difference to memory."""


@torch.no_grad()
def planned_finish(model: Any) -> Finish | None:
    """What a model makes of its head's product, so far as memory goes; None: its logits are made
    in another way, so that a run has whole ones. Call it under fake tensors."""
    module, head = model.get_output_embeddings(), output_head(model)
    if head is None:
        return None
    with in_part(model, first_block(model)), no_pieces(model):
        base, *others = base_of(model).modules()
        followed = _Followed()
        logits = followed.through(model, module, [base])
        if not followed.asked and is_base_of_its_part(model):
            followed = _Followed()
            logits = followed.through(model, module, others)
    if followed.asked != 1 or id(logits) not in followed.logits:
        return None
    rows = logits.shape[-1]
    return Finish(
        softcap=SOME if id(logits) in followed.capped else None,
        rows=rows if rows < head.weight.shape[0] else None,
    )


class _Followed(TorchDispatchMode):
    """Follows tensors through operations.

    Attributes:
        states: what is made of the hidden states, on the way to the head.
        logits: what is made of the head's product.
        capped: of these, what is capped.
        asked: how often a part was asked for hidden states.
    """

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[int, Tensor] = {}
        self.logits: dict[int, Tensor] = {}
        self.capped: set[int] = set()
        self.asked = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name, given = func.overloadpacket.__name__, [a for a in args if isinstance(a, Tensor)]
        alone = all(one.numel() == 1 for one in given[1:])
        if isinstance(out, Tensor) and given and alone:
            for known, more in ((self.states, ()), (self.logits, CAPS)):
                if id(given[0]) in known and (name in PLAIN or name in more):
                    known[id(out)] = out
                    if name in CAPS or id(given[0]) in self.capped:
                        self.capped.add(id(out))
        return out

    def through(self, model: Any, head: Any, parts: list[Any]) -> Tensor:
        """The logits of one forward pass, from the hidden states that one of the parts gives."""
        handles = [part.register_forward_hook(self._give) for part in parts]
        handles.append(head.register_forward_hook(self._multiply))
        was_training = model.training  # some go by the length of rows then
        model.eval()
        try:
            with self:
                logits: Tensor = model(input_ids=few_ids(model), use_cache=False).logits
                return logits
        finally:
            model.train(was_training)
            for handle in handles:
                handle.remove()

    def _give(self, module: Any, args: Any, output: Any) -> None:
        """A part has given hidden states."""
        states = getattr(output, "last_hidden_state", None)
        if states is not None:
            self.asked += 1
            self.states[id(states)] = states

    def _multiply(self, module: Any, args: Any, output: Tensor) -> None:
        """The head has multiplied."""
        if id(args[0]) in self.states:
            self.logits[id(output)] = output
