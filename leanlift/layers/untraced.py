"""What torch.compile leaves alone."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch

Call = TypeVar("Call", bound=Callable[..., Any])


def untraced(function: Call) -> Call:
    """`function`, called as it is where torch.compile compiles what is around it.

    A layer makes its weight anew by calls that a compiler knows nothing of: traced, they break the
    graph many times in each layer, and the shapes of each layer compile it again. Excluded, what is
    between the layers is compiled, with one break a layer.

    `torch.compiler.disable` itself imports the compiler, which takes seconds: here that waits until
    something else has.
    """
    excluded: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not excluded:
            if "torch._dynamo" not in sys.modules:
                return function(*args, **kwargs)
            excluded.append(torch.compiler.disable(function))
        return excluded[0](*args, **kwargs)

    return cast(Call, call)
