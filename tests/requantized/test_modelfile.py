"""A chat template in Go's syntax, and the Modelfile around it."""

from __future__ import annotations

import pytest
from tiny import make_tokenizer

from leanlift.requantized.modelfile import modelfile
from leanlift.requantized.prompts import stops_of, template_for
from leanlift.rows.examples import ALPACA

CHATML = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} "
    "[/INST]{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TURNS = (
    "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
    '{{ if eq .Role "user" }}%s{{ .Content }}%s'
    '{{ else if eq .Role "assistant" }}%s{{ .Content }}{{ if not $last }}%s{{ end }}{{ end }}'
    '{{ if and $last (ne .Role "assistant") }}%s{{ end }}{{ end }}'
)
START, END = "<|im_start|>", "<|im_end|>\n"
GO = {
    "chatml": "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ else }}"
    "<|im_start|>system\nYou help.<|im_end|>\n{{ end }}"
    + TURNS
    % (f"{START}user\n", END, f"{START}assistant\n", END, f"{START}assistant\n"),
    "gemma": "<pad>"
    + TURNS
    % (
        "<start_of_turn>user\n",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
        "<end_of_turn>\n",
        "<start_of_turn>model\n",
    ),
    "mistral": "<pad>" + TURNS % ("[INST] ", " [/INST]", "", "</s>", ""),
}


@pytest.mark.parametrize(
    ("name", "jinja"), [("chatml", CHATML), ("gemma", GEMMA), ("mistral", MISTRAL)]
)
def test_a_template_is_what_its_conversations_show(name: str, jinja: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.bos_token = "<pad>"  # which the tokenizer does not add by itself
    tokenizer.chat_template = jinja
    assert template_for(tokenizer).text == GO[name]


@pytest.mark.parametrize(
    "jinja",
    [
        CHATML.replace("You help.", "{{ messages | length }} messages."),
        CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}"),
        CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('4', 'four') }}"),
        CHATML.replace("You help.", "{{ '{{ date }}' }}"),
        "{{ raise_exception('never') }}",
    ],
    ids=["depends on the length", "changes contents", "changes some", "Go's signs", "refuses"],
)
def test_no_template_rather_than_a_wrong_one(jinja: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = jinja
    found = template_for(tokenizer)
    assert found.text is None
    assert "has no TEMPLATE" in found.words


def test_prompts_without_a_chat_template() -> None:
    tokenizer = make_tokenizer()
    plain = template_for(tokenizer, ["prompt", "completion"])
    alpaca = template_for(tokenizer, ["instruction", "input", "output"])
    assert plain.text == "{{ .Prompt }}{{ .Response }}"
    assert alpaca.text == ALPACA.replace("{instruction}", "{{ .Prompt }}") + "{{ .Response }}"
    ends = {tokenizer.eos_token_id}
    assert stops_of(tokenizer, ends, plain) == ["</s>"]
    assert stops_of(tokenizer, ends, alpaca) == ["</s>", "### Instruction:"]


def test_a_modelfile() -> None:
    drawn = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": None, "max_length": 9}
    text = modelfile("m-Q4_K_M.gguf", "{{ .Prompt }}", ["</s>", 'a "b"'], drawn)
    assert text == (
        'FROM ./m-Q4_K_M.gguf\nTEMPLATE """{{ .Prompt }}"""\nPARAMETER stop "</s>"\n'
        "PARAMETER temperature 0.6\nPARAMETER top_k 20\n"
    )
    greedy = modelfile("m.gguf", None, [], {"do_sample": False, "temperature": 0.6})
    assert greedy == "FROM ./m.gguf\nPARAMETER temperature 0.0\n"
