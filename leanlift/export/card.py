"""The model card of what an export writes: what it is, how it was made, how to use it.

Facts come from the adapter and from what a training run left beside it (`run.json`,
`memory.json`). Those are files that anyone may have written, so nothing but short plain values
goes into the card.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from leanlift.adapters import RUN_NAME, Adapter, PeftForm
from leanlift.errors import UserError
from leanlift.export.card_peft import peft_use
from leanlift.format import kept_words
from leanlift.io.bounded import MOST_OF_A_STRANGER
from leanlift.io.hub import snapshot_of
from leanlift.io.kinds import CAUSAL, IMAGES, auto_class_name
from leanlift.io.measured import kept_in
from leanlift.io.tensors import read_json

CARD_NAME = "README.md"

ONTO_WORDS = {
    "original": "the 16-bit weights of the base plus what was learned: no quantization error, and "
    "so not bit for bit the model that was trained",
    "quantized": "exactly the model that was trained: the weights of the base as they were "
    "quantized for training, plus what was learned",
}

HEADS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
"""Auto classes of models with a head that is not over a vocabulary, and what the hub calls it."""

MOST_TOKENS = 8
"""Ids of trained tokens that are listed."""

MOST_KEPT = 4
"""Sets of rows that were to be kept that are listed."""

TRAINING_KEYS = (
    "learning_rate",
    "lr_scheduler_type",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "max_length",
    "optim",
    "seed",
)
"""What of a run's settings a reader of the card wants to know."""

SERVE = """## Use

With transformers:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{name}")
print(generate({prompt}, max_new_tokens=256)[0]["generated_text"])
```

With vLLM: `vllm serve ./{name} --dtype {dtype}`

With llama.cpp: `python convert_hf_to_gguf.py {name} --outfile {name}.gguf`
"""

WITH_PROCESSOR = """## Use

With transformers:

```python
from transformers import AutoProcessor, {kind}

processor = AutoProcessor.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}")
```

With vLLM: `vllm serve ./{name} --dtype {dtype}`
"""

WITH_HEAD = """## Use

With transformers:

```python
from transformers import AutoTokenizer, {kind}

tokenizer = AutoTokenizer.from_pretrained("{name}")
model = {kind}.from_pretrained("{name}")
print(model(**tokenizer("Hello", return_tensors="pt")))
```
"""


def write_card(
    output: Path, adapter: Adapter, base: str, dtype: str, onto: str, title: str
) -> None:
    """Put the card of a merged checkpoint beside its files, which say whether there is a chat
    template, and what loads it whole; the arguments are those of `merged_card`."""
    chat = (output / "chat_template.jinja").is_file()
    kind = loaded_by(read_json(output / "config.json"))
    card = merged_card(adapter, base, dtype, onto, title, chat, kind)
    (output / CARD_NAME).write_text(card, encoding="utf-8")


def merged_card(
    adapter: Adapter,
    base: str,
    dtype: str,
    onto: str,
    name: str,
    chat: bool = False,
    kind: str = CAUSAL,
) -> str:
    """The card of a merged checkpoint.

    Args:
        adapter: what was merged.
        base: directory or hub name of the base checkpoint.
        dtype, onto: how it was merged.
        name: of the output directory.
        chat: whether it has a chat template.
        kind: transformers' Auto class that loads it whole.
    """
    prompt = '[{"role": "user", "content": "Hello"}]' if chat else '"Hello"'
    facts = {"weights": dtype, "merged onto": f"{onto}: {ONTO_WORDS[onto]}"}
    use = SERVE if kind == CAUSAL else WITH_HEAD if kind in HEADS else WITH_PROCESSOR
    lines = [
        *_front_matter(base, "transformers", kind),
        f"# {name}",
        "",
        f"{_shown(base)}, fine-tuned with leanlift: a few per cent of each weight matrix, its "
        "principal weights (LIFT, arXiv 2506.00772), were trained over a frozen base.",
        "",
        *_about(adapter, base, facts),
        use.format(name=name, prompt=prompt, dtype=dtype, kind=kind),
    ]
    return "\n".join(lines)


def peft_card(adapter: Adapter, name: str, form: PeftForm) -> str:
    """The card of an adapter in a form of PEFT's."""
    base = adapter.base.name
    place = snapshot_of(base, adapter.base.revision)
    kind = loaded_by({} if place is None else _read(place / "config.json"), images=False)
    lines = [
        *_front_matter(base, "peft", kind),
        f"# {name}",
        "",
        f"A sparse adapter (PEFT's {form.words} form) for {_shown(base)}, trained with leanlift.",
        "",
        *_about(adapter, base, {}),
        *peft_use(adapter, name, _shown(base), kind, form),
    ]
    return "\n".join(lines)


def loaded_by(config: Mapping[str, Any], images: bool = True) -> str:
    """Transformers' Auto class that loads a checkpoint whole, or, but for `images`, its text part;
    with the head that it has.

    Args:
        config: its config.json.
        images: whether the part that sees is wanted too.
    """
    named = config.get("architectures")
    architecture = str(named[0]) if isinstance(named, list) and named else ""
    head = (kind for kind in HEADS if architecture.endswith(kind.removeprefix("AutoModel")))
    return next(head, None) or auto_class_name(config, images) or CAUSAL


def _is_hub_name(base: str) -> bool:
    return base.count("/") == 1 and not base.startswith((".", "~", "/"))


def _shown(base: str) -> str:
    """A hub name; of a local directory its last part: the rest means nothing to others."""
    return _plain(base if _is_hub_name(base) else Path(base).name)


def _front_matter(base: str, library: str, kind: str) -> list[str]:
    """What the hub reads."""
    task = "image-text-to-text" if kind == IMAGES else HEADS.get(kind, "text-generation")
    return [
        "---",
        *([f"base_model: {_plain(base)}"] if _is_hub_name(base) else []),
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags: [leanlift, sparse-fine-tuning]",
        "---",
    ]


def _about(adapter: Adapter, base: str, facts: dict[str, str]) -> list[str]:
    """Tables: how it was made, the run's settings, its memory."""
    config, shapes = adapter.config, adapter.base.shapes
    run = _read(adapter.directory / RUN_NAME)
    budget = f"density {config.density:g}"
    if config.rank_budget is not None:
        budget = f"r = {config.rank_budget}, that is r · (m + n) entries per matrix"
    formats = sorted({str(adapter.base.formats[name]) for name in shapes})
    ends = tuple(f".{name}" for name in config.modules_to_save)
    whole = [name for name in shapes if f".{name}".endswith(ends)]
    table = {
        "base": _shown(base),
        "trained over": f"{', '.join(formats)}, computed in {adapter.base.dtype}",
        "trained": f"{budget} of {len(shapes) - len(whole)} matrices, chosen by {config.selector} "
        f"(R = {config.approx_rank}), {adapter.refreshes} mask refreshes",
        **({"trained whole": ", ".join(whole)} if whole else {}),
        **_tokens(config.trainable_token_indices),
        **facts,
    }
    table |= _data(run)
    kept = [kept_words(replace(each, name=Path(each.name).name)) for each in kept_in(run)]
    table |= {"kept": "; ".join(f"loss on {words}" for words in kept[:MOST_KEPT])} if kept else {}
    lines = ["| | |", "|---|---|", *(f"| {key} | {_plain(v)} |" for key, v in table.items()), ""]
    settings = [f"`{k}: {_plain(str(run[k]))}`" for k in TRAINING_KEYS if k in run]
    if settings:
        lines += ["## Training", "", ", ".join(settings), ""]
    return lines + _memory(adapter.directory)


def _data(run: Mapping[str, Any]) -> dict[str, str]:
    """Which rows were trained on, files without the places where they were."""
    several = run.get("datasets")
    given = (
        several if isinstance(several, list) and several else [{"path": run.get("dataset_name")}]
    )
    paths = [each.get("path") for each in given if isinstance(each, dict)]
    names = [Path(p).name if Path(p).suffix else p for p in paths if isinstance(p, str) and p]
    return {"data": ", ".join(names)} if names else {}


def _tokens(ids: Sequence[int]) -> dict[str, str]:
    """Which tokens were trained, if some were."""
    if not ids:
        return {}
    more = f" and {len(ids) - MOST_TOKENS} more" if len(ids) > MOST_TOKENS else ""
    return {"trained tokens": ", ".join(map(str, ids[:MOST_TOKENS])) + more}


def _memory(directory: Path) -> list[str]:
    """The training step's bytes by category, where a run has measured them."""
    categories = _read(directory / "memory.json").get("categories")
    if not isinstance(categories, dict):
        return []
    measured = {_plain(str(k)): v for k, v in categories.items() if type(v) is int and v >= 0}
    if not measured:
        return []
    rows = [f"| {name} | {nbytes / 2**20:,.1f} |" for name, nbytes in measured.items()]
    total = sum(measured.values()) / 2**20
    return ["## Memory of the training step", "", "| | MiB |", "|---|---|", *rows,
            f"| **peak** | {total:,.1f} |", ""]  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read: a card can do without."""
    with suppress(UserError, OSError):
        data = read_json(path, MOST_OF_A_STRANGER)
        if isinstance(data, dict):
            return data
    return {}


def _plain(text: str) -> str:
    """One short line without Markdown or YAML in it."""
    return "".join(c for c in text if c.isprintable() and c not in "|`<>[]{}#*\"'")[:200]
