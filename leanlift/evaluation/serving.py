"""A model behind transformers' own OpenAI-compatible server.

What `transformers serve` runs is `Serve`: endpoints, streaming, a queue in which a model answers
one request at a time. It asks a `ModelManager` for the model of a name. A live one (a quantized
base with an adapter on it) has no name that it could be loaded by, so the two methods that load
are overridden, which are alike in all versions that are supported. Beside that, a server loads no
other model than the one it was started with, whoever asks (`/load_model` asks nobody). Nothing
else is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

Load = Callable[[], Any]


def serve(
    name: str, load_model: Load | None = None, load_processor: Load | None = None, **options: Any
) -> Any:
    """Serve one model until Ctrl-C.

    Args:
        name: what clients call it: a checkpoint directory or a hub name, or any, if it is given.
        load_model, load_processor: what gives it and its tokenizer, for one that transformers
            cannot load by its name; called once, and again after a client's `/reset`.
        options: of transformers' `Serve`; with `non_blocking` it is returned while it serves.
    """

    class OneModel(model_manager.ModelManager):  # type: ignore[name-defined]
        def _load_processor(self, asked: str, *rest: Any, **more: Any) -> Any:
            if asked != self.process_model_name(name):
                raise ValueError(f"this server has {name} alone")
            if load_processor is not None:
                return load_processor()
            return super()._load_processor(asked, *rest, **more)

        def _load_model(self, *rest: Any, **more: Any) -> Any:
            return super()._load_model(*rest, **more) if load_model is None else load_model()

        def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
            """What 5.17 answers to /v1/models; later versions list what they are pinned to."""
            return [{"owned_by": "local", "id": name, "object": "model", "created": 0}]

    with patch.object(model_manager, "ModelManager", OneModel):  # where `Serve` looks it up
        return Serve(force_model=name, **options)
