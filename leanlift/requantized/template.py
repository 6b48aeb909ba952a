"""A chat template as Ollama has it, found by asking the model's own.

The tokenizer's template is Jinja. Ollama's are templates of Go, and of a GGUF file's own template
it makes one only where it finds the text among a few that it knows. Most templates do one thing:
they put text before and after each message, by its role. What it is can be read off a few
conversations that the template itself renders; the same is written in Go's syntax. Then other
conversations (several turns, with a system message and without) are rendered by both, and where one
character differs there is no such template: a wrong prompt is worse than none.

Tools, thinking and images are not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]
"""Renders a conversation, with the beginning of the next answer or without."""

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
MARKS = {SYSTEM: "Qsystemq", USER: "Quserq", ASSISTANT: "Qassistantq"}
"""Contents by which the text around them is found."""


@dataclass(frozen=True)
class Turns:
    """The text around the messages of a conversation.

    Attributes:
        first: at the beginning where there is no system message.
        system: before and after a system message.
        user, assistant: before and after theirs.
        answer: before the answer that the model is to give.
    """

    first: str
    system: tuple[str, str] | None
    user: tuple[str, str]
    assistant: tuple[str, str]
    answer: str

    def render(self, messages: Sequence[Message], answering: bool) -> str:
        """A conversation, as `go` makes it."""
        rest = list(messages)
        text = self.first
        if rest[0]["role"] == SYSTEM:
            before, after = self.system or ("", "")
            text = before + rest.pop(0)["content"] + after
        for message in rest:
            before, after = self.user if message["role"] == USER else self.assistant
            text += before + message["content"] + after
        return text + self.answer * answering

    @property
    def go(self) -> str:
        """The template in Go's syntax, with the fields that Ollama gives one."""
        head = self.first
        if self.system is not None:
            before, after = self.system
            other = f"{{{{ else }}}}{self.first}" if self.first else ""
            head = f"{{{{ if .System }}}}{before}{{{{ .System }}}}{after}{other}{{{{ end }}}}"
        (before, after), (asked, ended) = self.user, self.assistant
        return (
            f"{head}{{{{ range $i, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{{{{ if eq .Role "user" }}}}{before}{{{{ .Content }}}}{after}'
            f'{{{{ else if eq .Role "assistant" }}}}{asked}{{{{ .Content }}}}'
            f"{{{{ if not $last }}}}{ended}{{{{ end }}}}{{{{ end }}}}"
            f'{{{{ if and $last (ne .Role "assistant") }}}}{self.answer}{{{{ end }}}}{{{{ end }}}}'
        )


def turns_of(render: Render) -> Turns | None:
    """The text around messages in a chat template's conversations; None where the template does
    more than that, or what it writes cannot stand in Ollama's Modelfile.

    Args:
        render: the template; it may raise whatever it likes for a conversation that it refuses.
    """
    try:
        found = _found(render)
    except Exception:  # a template raises what it likes, jinja2's and its own errors
        return None
    texts = [found.first, *(found.system or ()), *found.user, *found.assistant, found.answer]
    if any(sign in text for text in texts for sign in ("{{", "}}", '"""')):
        return None
    return found if _agrees(found, render) else None


def _found(render: Render) -> Turns:
    """What stands around the marks; a ValueError where one is not found."""
    user, answered, asked = _of(USER), [*_of(USER), *_of(ASSISTANT)], _of(USER)
    head, after_user = _parts(render(user, False), USER)
    _, to_answer = _parts(render(user, True), USER)
    answer = _without(to_answer, after_user)
    _, middle, after_answer = _parts(render(answered, False), USER, ASSISTANT)
    before_answer = _without(middle, after_user)
    between = _parts(render([*answered, *asked], False), USER, ASSISTANT, USER)[2]
    before_user = _without(between, after_answer)
    first = head.removesuffix(before_user)
    return Turns(
        first=first,
        system=_system(render, before_user),
        user=(before_user, after_user),
        assistant=(before_answer, after_answer),
        answer=answer,
    )


def _system(render: Render, before_user: str) -> tuple[str, str] | None:
    """What stands around a system message; None where the template takes none."""
    try:
        before, after, _ = _parts(render([*_of(SYSTEM), *_of(USER)], False), SYSTEM, USER)
    except Exception:  # as above
        return None
    return (before, after.removesuffix(before_user)) if after.endswith(before_user) else None


def _agrees(turns: Turns, render: Render) -> bool:
    """Whether conversations of several turns come out the same."""
    talk = [
        {"role": USER, "content": "What is 2 + 2?"},
        {"role": ASSISTANT, "content": "It is 4."},
        {"role": USER, "content": "And 3 + 3?\nIn words."},
        {"role": ASSISTANT, "content": "Six."},
        {"role": USER, "content": "Thanks."},
    ]
    system = [{"role": SYSTEM, "content": "Answer in one line."}]
    asked = [talk[:1], talk[:3], talk]
    if turns.system is not None:
        asked += [[*system, *each] for each in list(asked)]
    return all(turns.render(each, True) == render(each, True) for each in asked)


def _of(role: str) -> list[Message]:
    return [{"role": role, "content": MARKS[role]}]


def _parts(text: str, *roles: str) -> list[str]:
    """The text before, between and after the contents of messages."""
    parts = []
    for role in roles:
        before, mark, text = text.partition(MARKS[role])
        if not mark:
            raise ValueError(f"the content of {role} is not in the text")
        parts.append(before)
    return [*parts, text]


def _without(text: str, start: str) -> str:
    if not text.startswith(start):
        raise ValueError("the text around a message depends on what follows")
    return text.removeprefix(start)
