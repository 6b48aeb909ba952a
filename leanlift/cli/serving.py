"""`leanlift serve`: transformers' server, with a live adapter or with a model by its name."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from leanlift.cli.eval_base import arguments_of, tokenization_of
from leanlift.cli.talk import loaded
from leanlift.errors import UserError, first_line
from leanlift.evaluation.answers import end_tokens
from leanlift.evaluation.evaluate import quiet_loading
from leanlift.evaluation.serving import serve
from leanlift.measure import is_out_of_memory
from leanlift.training.base import check_base_place

NO_TEMPLATE = (
    "The tokenizer has no chat template: /v1/completions answers, /v1/chat/completions cannot."
)


def serve_command(options: argparse.Namespace) -> int:
    """Load, and serve until Ctrl-C."""
    options.dataset_text_field = options.formatting_func = None
    args = arguments_of(options)
    check_base_place(args)
    tokenizer, how = tokenization_of(args.model_name_or_path, args.model_revision, options)
    name = served_name(options)
    _say(f"Loading {name}, for clients of http://{options.host}:{options.port}/v1.")
    if not how.chat:
        _say(NO_TEMPLATE)
    where = {"host": options.host, "port": options.port, "enable_cors": options.enable_cors}
    try:
        if options.adapter:
            serve(name, partial(_model, options, args, tokenizer), lambda: tokenizer, **where)
        else:
            serve(name, **_held(options), **where)
    except KeyboardInterrupt:  # how a server ends
        return 0
    except Exception as error:  # each config class and quantizer has its own ways to refuse
        if isinstance(error, UserError) or is_out_of_memory(error):
            raise
        raise UserError(f"{name} cannot be served: {first_line(error)}") from error
    return 0


def served_name(options: argparse.Namespace) -> str:
    """What clients call the model: a run by its directory's own name, anything else as it was
    named."""
    if options.adapter is None:
        return str(options.model)
    directory = Path(options.adapter)
    return directory.resolve().name if directory.is_dir() else str(options.adapter)


def _model(options: argparse.Namespace, args: Any, tokenizer: Any) -> Any:
    """The model that `leanlift chat` loads; where it stops, the server learns from the model."""
    with quiet_loading():
        model = loaded(options, args)
    config = model.generation_config
    config.eos_token_id = end_tokens(model, tokenizer)
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = config.eos_token_id[0] if pad is None else pad
    return model


def _held(options: argparse.Namespace) -> dict[str, Any]:
    """How transformers' server is told to hold a model."""
    four, eight = options.load_in_4bit, options.load_in_8bit
    return {
        "dtype": options.dtype or "auto",
        "quantization": "bnb-4bit" if four else "bnb-8bit" if eight else None,
    }


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
