"""A model behind transformers' own OpenAI-compatible server.

What `transformers serve` runs is `Serve`: endpoints, streaming, a queue in which a model answers
one request at a time. It asks a `ModelManager` for the model of a name. A live one (a quantized
base with an adapter on it) has no name that it could be loaded by, so the two methods that load
are overridden, which are alike in all versions that are supported. Beside that, a server loads no
other model than the one it was started with, whoever asks (`/load_model` asks nobody), and chats
without a chat template are refused in a sentence, where transformers would end in status 500.
Nothing else is ours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

from fastapi import HTTPException
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

Load = Callable[[], Any]

NO_CHATS = (
    "{name} has no chat template, so it takes no chats: send the text that it is to continue to "
    "/v1/completions, or save a chat template with its tokenizer."
)


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
                return refusing_chats(load_processor(), name)
            return refusing_chats(super()._load_processor(asked, *rest, **more), name)

        def _load_model(self, *rest: Any, **more: Any) -> Any:
            return super()._load_model(*rest, **more) if load_model is None else load_model()

        def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
            """What 5.17 answers to /v1/models; later versions list what they are pinned to."""
            return [{"owned_by": "local", "id": name, "object": "model", "created": 0}]

    with patch.object(model_manager, "ModelManager", OneModel):  # where `Serve` looks it up
        return Serve(force_model=name, **options)


def refusing_chats(processor: Any, name: str) -> Any:
    """The processor; one without a chat template refuses a chat as the server can answer it.

    Args:
        processor: a tokenizer, or what holds one beside what reads images.
        name: what clients call the model.
    """
    if getattr(processor, "chat_template", None) is None:

        def refuse(*_: Any, **__: Any) -> Any:
            raise HTTPException(400, NO_CHATS.format(name=name))

        processor.apply_chat_template = refuse
    return processor
