"""The base under an adapter as a model of its own, which shares all tensors with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from leanlift.model import lift_state, lifted


class ReferenceModel(nn.Module):
    """Computes what an attached model computes without its adapter; it has no tensors of its own,
    so nothing of it is trained, moved, saved or copied.

    Args:
        model: attached.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.__dict__["_lifted"] = lifted(model)  # no submodule: its parameters are another's
        lift_state(model)
        self.eval()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "_lifted":
                raise
            return getattr(self.__dict__["_lifted"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the base, in evaluation mode; trainers put a `forward` of their own in the place of a
        model's, and that too goes through the base."""
        with self._as_base():
            return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        return self.__dict__["_lifted"](*args, **kwargs)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's."""
        with self._as_base():
            return self.__dict__["_lifted"].generate(*args, **kwargs)

    @contextmanager
    def _as_base(self) -> Iterator[None]:
        model = self.__dict__["_lifted"]
        training = [part for part in model.modules() if part.training]
        model.eval()
        try:
            with torch.no_grad(), lift_state(model).workspace.without_offsets():
                yield
        finally:
            for part in training:
                part.training = True


def reference_model(model: nn.Module) -> ReferenceModel:
    """The frozen base of an attached model as a model of its own, without a second copy: for a loss
    or a trainer that wants a reference. It shares all tensors, and computes as the base even while
    the other is trained.

    Raises:
        UserError: nothing is attached.
    """
    return ReferenceModel(model)
