"""The tokenizer of a run, with what the settings change about it.

TRL changes the tokenizer while a trainer is built: `eos_token`, `chat_template_path`, a pad token.
Rows are converted before that, and where tokens need rows in the embedding, it has to grow while
the base is attached to. So all of it is applied once, before rows are converted and before the base
is loaded, by `leanlift train` and by `LiftTrainer`. `leanlift train` gives a template's tokens the
rows that they need; a model that is there already must have them.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from leanlift.errors import UserError, first_line
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.files import read_json
from leanlift.weights.grown import check_growth

logger = logging.getLogger("leanlift")

TEMPLATE_ENDINGS = (".jinja", ".j2", ".jinja2")


def load_tokenizer(
    source: str | Path, trust_remote_code: bool = False, revision: str | None = None
) -> Any:
    """A tokenizer as stock transformers loads it.

    Args:
        source: a checkpoint or adapter directory, or a hub name.
        trust_remote_code, revision: as in `from_pretrained`.

    Raises:
        UserError: missing or damaged.
    """
    path = Path(source).expanduser()
    name = str(path) if path.exists() else str(source)
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # tokenizers raises bare Exceptions
        raise UserError(
            f"the tokenizer of {source} cannot be loaded: {first_line(error)}"
        ) from error
    if getattr(tokenizer, "chat_template", None) is None:
        tokenizer.chat_template = _processor_template(path)
    return tokenizer


def _processor_template(directory: Path) -> str | None:
    """The template that older versions of transformers saved with a processor, where no tokenizer
    looks for it."""
    file = directory / "chat_template.json"
    data = read_json(file, MOST_OF_A_STRANGER) if file.is_file() else {}
    found = data.get("chat_template") if isinstance(data, dict) else None
    return found if isinstance(found, str) else None


def tokenizer_of(processing_class: Any) -> Any:
    """The tokenizer of a processor, with the processor's chat template; or the tokenizer itself."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = processing_class.chat_template
    return tokenizer


def check_end_token(tokenizer: Any) -> None:
    """Raises a UserError where a tokenizer has none."""
    if getattr(tokenizer, "eos_token", None) is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the base'} has no end-of-sequence "
            "token: name one with eos_token (in its tokenizer_config.json, or as a training "
            "argument), or the model would never learn to stop."
        )


def vocabulary_rows(
    name: str, trust_remote_code: bool = False, revision: str | None = None
) -> int | None:
    """Rows of a base's embedding by its config.json; None where that does not say."""
    return base_number(name, "vocab_size", trust_remote_code, revision)


def base_number(
    name: str, key: str, trust_remote_code: bool = False, revision: str | None = None
) -> int | None:
    """A number of a base's config.json above 0; None where that does not say."""
    try:
        config = AutoConfig.from_pretrained(
            str(Path(name).expanduser()) if Path(name).expanduser().exists() else name,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
    except Exception:  # whatever is wrong with it, loading the base says so
        return None
    found = getattr(config.get_text_config(), key, None)
    return found if isinstance(found, int) and found > 0 else None


def end_tokens(name: str, revision: str | None = None) -> tuple[int, ...]:
    """Where the generation config of a base says that a text ends."""
    try:
        path = Path(name).expanduser()
        found = str(path) if path.exists() else name
        config = GenerationConfig.from_pretrained(found, revision=revision)
    except Exception:  # most bases that have none
        return ()
    return as_ids(config.eos_token_id)


def as_ids(given: Any) -> tuple[int, ...]:
    """Token ids that a config gives as a number, a list or not at all."""
    return tuple(given if isinstance(given, (list, tuple)) else [] if given is None else [given])


def rows_for_template(tokenizer: Any, sft: Any, rows: int) -> int | None:
    """Take over the template and the tokens of `chat_template_path`.

    Args:
        tokenizer: of the base; changed in place.
        sft: an `SFTConfig`.
        rows: of the base's embedding.

    Returns:
        How many rows the embedding needs for the tokens; None where it has them.

    Raises:
        UserError: as for `prepare_tokenizer`, or more tokens than an embedding may grow by.
    """
    if sft.chat_template_path is None:
        return None
    source = str(sft.chat_template_path)
    beyond = _without_rows(tokenizer, _take_template(tokenizer, source), rows)
    if not beyond:
        return None
    needed = max(beyond.values()) + 1
    check_growth(needed, rows, f"chat_template_path {source}")
    logger.warning(
        "chat_template_path %s brings %d tokens that the base has no embedding for, %s: they "
        "get rows there and in the output head, made of the base's and frozen; what they mean is "
        "learned by the layers between alone.",
        source,
        len(beyond),
        _some(list(beyond)),
    )
    return needed


def prepare_tokenizer(tokenizer: Any, sft: Any, rows: int | None = None) -> Any:
    """Apply `chat_template_path`, `eos_token` and `pad_token` of the training arguments, in place.

    Args:
        tokenizer: of the base.
        sft: an `SFTConfig`.
        rows: that the embedding has, or will have; None: not known.

    Raises:
        UserError: a template that is not there, or tokens that the tokenizer or the embedding has
            not.
    """
    if sft.chat_template_path is not None:
        names = _take_template(tokenizer, str(sft.chat_template_path))
        _check_rows(tokenizer, f"chat_template_path {sft.chat_template_path} adds", names, rows)
    if sft.eos_token is not None:
        tokenizer.eos_token = _known(tokenizer, sft.eos_token, "eos_token")
    check_end_token(tokenizer)
    wanted = getattr(sft, "pad_token", None)
    if wanted is not None:
        tokenizer.pad_token = _known(tokenizer, wanted, "pad_token")
    elif tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    used = [tokenizer.eos_token, tokenizer.pad_token]
    _check_rows(tokenizer, "the tokenizer ends and pads texts with", used, rows)
    return tokenizer


def _check_rows(tokenizer: Any, what: str, tokens: list[str], rows: int | None) -> None:
    beyond = {} if rows is None else _without_rows(tokenizer, tokens, rows)
    if beyond:
        needed = max(beyond.values()) + 1
        raise UserError(
            f"{what} {_some(list(beyond))}, and the base's embedding has no rows for that (it has "
            f"{rows}, and {needed} are needed): use tokens that the base has, or give the model "
            f"more rows with get_lift_model(model, config, embedding_rows={needed})."
        )


def _without_rows(tokenizer: Any, tokens: list[str], rows: int) -> dict[str, int]:
    """Tokens whose ids are beyond the rows of an embedding."""
    ids = dict(zip(tokens, tokenizer.convert_tokens_to_ids(tokens), strict=True))
    return {token: number for token, number in ids.items() if number >= rows}


def _some(tokens: list[str]) -> str:
    return ", ".join(tokens[:5]) + (", …" if len(tokens) > 5 else "")


def _known(tokenizer: Any, token: str, key: str) -> str:
    if token not in tokenizer.get_vocab():
        raise UserError(f"{key} {token!r} is no token of the tokenizer: choose one that it has.")
    return token


def _take_template(tokenizer: Any, source: str) -> list[str]:
    """The chat template of a Jinja file; or that of another tokenizer with its tokens and end.

    Returns:
        The tokens that were added to the other one.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if path.suffix not in TEMPLATE_ENDINGS:
            raise UserError(
                f"chat_template_path {source} is no template: expected a .jinja file, or a "
                "directory or hub name of a tokenizer."
            )
        tokenizer.chat_template = path.read_text(encoding="utf-8")
        return []
    if path.suffix in TEMPLATE_ENDINGS:
        raise UserError(f"chat_template_path {source} does not exist.")
    other = load_tokenizer(source)
    if other.chat_template is None:
        raise UserError(f"the tokenizer of chat_template_path {source} has no chat template.")
    vocabulary, added = tokenizer.get_vocab(), list(other.added_tokens_decoder.values())
    tokenizer.chat_template = other.chat_template
    tokenizer.add_tokens([token for token in added if token.content not in vocabulary])
    if other.eos_token is not None:
        tokenizer.eos_token = _known(tokenizer, other.eos_token, "the template's eos_token")
    return [token.content for token in added]


def tell_model(model: Any, tokenizer: Any, sft: Any) -> None:
    """Write the end token that the settings chose into the model's configs, as TRL does, so that
    they are saved, merged and generated with; what Trainer aligns when training starts is left."""
    if sft.eos_token is None and sft.chat_template_path is None:
        return
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        known = as_ids(generation.eos_token_id)
        if tokenizer.eos_token_id not in known:
            generation.eos_token_id = [tokenizer.eos_token_id, *known]


def marked_template(tokenizer: Any) -> str | None:
    """A template that marks the assistant's tokens: None where the tokenizer's own does."""
    own = getattr(tokenizer, "chat_template", None)
    if own is None or has_generation_markers(own):
        return None
    try:
        return get_training_chat_template(tokenizer)
    except Exception as error:  # it renders the template too
        raise UserError(
            "assistant_only_loss needs a chat template with {% generation %} markers, and TRL has "
            f"none to take in place of this one: {first_line(error)}"
        ) from error
