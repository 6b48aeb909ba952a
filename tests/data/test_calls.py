"""Arguments of calls come in the form that a template takes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers_of_all_kinds import CHATML, THINKING, characters

from leanlift.data.calls import as_taken, takes_texts
from leanlift.data.dataset import token_rows
from leanlift.data.tokens import Tokenization


def with_calls(inner: str) -> str:
    return (
        "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}" + inner + "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )


TAKES = {
    "objects": (CHATML, False),
    "objects, inside": (with_calls("{{ c.function.arguments | tojson }}"), False),
    "texts": (with_calls("{{ '(' + c.function.arguments + ')' }}"), True),
    "texts, printed": (with_calls("{{ c.function.arguments }}"), True),
    "both": (
        with_calls(
            "{% if c.function.arguments is string %}{{ c.function.arguments }}"
            "{% else %}{{ c.function.arguments | tojson }}{% endif %}"
        ),
        None,
    ),
    "no calls": (THINKING, None),
}
GIVEN: dict[str, Any] = {"a": 1, "s": 'é"', "n": None}


@pytest.mark.parametrize("kind", TAKES)
@pytest.mark.parametrize("form", ["object", "text"])
def test_a_call_is_trained_once_as_json(kind: str, form: str) -> None:
    template, texts = TAKES[kind]
    tokenizer = characters(template)
    assert takes_texts(tokenizer) is texts
    if kind == "no calls":
        return
    arguments = GIVEN if form == "object" else json.dumps(GIVEN, ensure_ascii=False)
    call = {"role": "assistant", "content": "", "tool_calls": [
        {"type": "function", "function": {"name": "f", "arguments": arguments}}
    ]}  # fmt: skip
    row = {"messages": [{"role": "user", "content": "q"}, call]}
    (made,) = token_rows([row], Tokenization.of(tokenizer)).data
    text = tokenizer.decode(made["input_ids"]).replace("<unk>", "é")
    assert json.dumps(GIVEN, ensure_ascii=False) in text
    assert row["messages"][1]["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("arguments", ["{", "[1]", "5", 5, None, [1]])
@pytest.mark.parametrize("texts", [True, False])
def test_what_is_no_object_stays(arguments: Any, texts: bool) -> None:
    turn = {"role": "assistant", "tool_calls": [{"function": {"arguments": arguments}}]}
    others = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": "f"}]
    assert as_taken([*others, turn], texts) == [*others, turn]
