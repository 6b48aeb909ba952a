"""Ollama's Modelfile: which file, how a conversation becomes a prompt, where an answer ends.

`ollama create NAME -f Modelfile` reads it. The syntax is in Ollama's docs/modelfile.mdx.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

PROMPT, RESPONSE = "{{ .Prompt }}", "{{ .Response }}"
SAMPLING = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}
"""Keys of a generation config, and what Ollama calls them."""


def modelfile(
    file: str, template: str | None, stops: Sequence[str], generation: Mapping[str, Any]
) -> str:
    """The text of a Modelfile.

    Args:
        file: the GGUF file's name, in the same directory.
        template: in Go's syntax; None: Ollama is left to find one.
        stops: texts at which an answer ends.
        generation: the model's generation_config.json.
    """
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops if _quoted(stop)]
    lines += [f"PARAMETER {name} {value}" for name, value in sampling(generation).items()]
    return "\n".join(lines) + "\n"


def sampling(generation: Mapping[str, Any]) -> dict[str, float]:
    """What a generation config says of how tokens are drawn, in Ollama's words; greedy where it
    says that none are."""
    if generation.get("do_sample") is False:
        return {"temperature": 0.0}
    said = {ours: generation.get(theirs) for theirs, ours in SAMPLING.items()}
    return {
        name: value
        for name, value in said.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def of_prompt(prompt: str, message: str) -> str | None:
    """A template that puts a message into a prompt, for models that take no conversations.

    Args:
        prompt: with a place for the message.
        message: the place.
    """
    if "{{" in prompt or '"""' in prompt:
        return None
    return prompt.replace(message, PROMPT) + RESPONSE


def _quoted(text: str) -> str:
    """A text between quotation marks; empty where it has some itself."""
    return f'"{text}"' if text and '"' not in text and text.isprintable() else ""
