"""Small tokenizers and chat templates with the habits that real ones have."""

from __future__ import annotations

from tiny import CHARACTERS, make_tokenizer
from tokenizers import Tokenizer, models, processors, trainers
from tokenizers.decoders import Fuse
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    "{% if m.tool_calls %}{% for c in m.tool_calls %}<{{ c.function | tojson }}>{% endfor %}"
    "{% endif %}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Turns end in the end token and a line break, as in ChatML."""

THINKING = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]<think>\n{% endif %}"
)
"""The prompt opens a thought, and the whole chat has none."""

SWITCHED = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if style is defined %}({{ style }}){% endif %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Takes a keyword of its own."""

MARKED = (
    "{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
"""Says which tokens are the assistant's."""


def characters(template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def wrapping(start: bool = True, end: bool = False) -> PreTrainedTokenizerFast:
    """Puts the start token before a text, or the end token behind it, by itself."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<unk>"})  # a row that the tiny embedding has
    parts = ["<unk>:0"] * start + ["$A:0"] + ["</s>:0"] * end
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(parts), pair=None, special_tokens=[("<unk>", 2), ("</s>", 1)]
    )
    return tokenizer


def merging(template: str | None = None) -> PreTrainedTokenizerFast:
    """Byte pairs without pre-tokenization, so that tokens reach over the end of a prompt."""
    model = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=len(CHARACTERS) + 60,
        special_tokens=["<pad>", "</s>"],
        initial_alphabet=list(CHARACTERS),
        show_progress=False,
    )
    model.train_from_iterator(["so it is is it so: is it. ", "it is: it is: so so "] * 50, trainer)
    model.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", eos_token="</s>")
    tokenizer.chat_template = template
    return tokenizer
