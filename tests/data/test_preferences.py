"""Rows of preferences and rewards: TRL's trainers make of them what the rows say, and rows of
another kind are one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from chats import write
from datasets import Dataset, IterableDataset
from sweeps import swept
from tiny import make_checkpoint
from tokenizers_of_all_kinds import CHATML, SWITCHED, characters
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer

from leanlift import UserError
from leanlift.data.preferences import previews, rows_for
from leanlift.data.tokens import Tokenization
from leanlift.rows.first import check_first_rows
from leanlift.rows.mixture import Mixture
from leanlift.rows.preferences import METHODS

TOOLS = [{"type": "function", "function": {"name": "f"}}]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def says(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def calls(**arguments: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": arguments}
    return {"role": "assistant", "content": None, "tool_calls": [{"function": function}]}


ASKED = "[user]q</s>\n[assistant]"
GOOD, BAD = "good</s>\n", "bad</s>\n"
PAIRS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "texts": (
        {"prompt": "q: ", "chosen": "good", "rejected": "bad"},
        ["q: ", "good</s>", "bad</s>"],
    ),
    "texts, whole": ({"chosen": "q: good", "rejected": "q: bad"}, ["q:", " good</s>", " bad</s>"]),
    "chats": (
        {"prompt": [user("q")], "chosen": [says("good")], "rejected": [says("bad")], "id": 7},
        [ASKED, GOOD, BAD],
    ),
    "chats, whole": (
        {"chosen": [user("q"), says("good")], "rejected": [user("q"), says("bad")]},
        [ASKED, GOOD, BAD],
    ),
    "a text that whole chats begin with": (
        {"prompt": "q", "chosen": [user("q"), says("good")], "rejected": [user("q"), says("bad")]},
        [ASKED, GOOD, BAD],
    ),
    "a prompt that chats repeat": (
        {
            "prompt": [user("q")],
            "chosen": [user("q"), says("good")],
            "rejected": [user("q"), says("bad")],
        },
        [ASKED, GOOD, BAD],
    ),
    "sharegpt": (
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "good"},
            "rejected": {"from": "gpt", "value": "bad"},
        },
        [ASKED, GOOD, BAD],
    ),
    "a system prompt": (
        {"system": "s", "chosen": [user("q"), says("good")], "rejected": [user("q"), says("bad")]},
        [f"[system]s</s>\n{ASKED}", GOOD, BAD],
    ),
    "tools": (
        {
            "prompt": [user("q")],
            "chosen": [calls(a=1)],
            "rejected": [says("bad")],
            "tools": TOOLS,
        },
        [
            f'[tools][{{"type": "function", "function": {{"name": "f"}}}}]{ASKED}',
            '<{"name": "f", "arguments": {"a": 1}}></s>\n',
            BAD,
        ],
    ),
}
"""Rows, and what DPO makes of them: prompt, chosen and rejected."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("preferences") / "base", tied=False)


def trained(method: str, rows: Any, tokenizer: Any, base: Path, out: Path) -> Dataset:
    """What TRL's trainer has made of rows."""
    settings = {"output_dir": str(out), "use_cpu": True, "bf16": False, "report_to": "none"}
    kinds: dict[str, tuple[Any, Any, Any]] = {
        "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM),
        "kto": (KTOTrainer, KTOConfig, AutoModelForCausalLM),
        "reward": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification),
    }
    trainer, config, kind = kinds[method]
    more = {"num_labels": 1} if method == "reward" else {}
    model = kind.from_pretrained(base, dtype=torch.float32, **more)
    settings |= {"per_device_train_batch_size": 2} if method == "kto" else {}
    made = trainer(model, args=config(**settings), train_dataset=rows, processing_class=tokenizer)
    return made.train_dataset


CHEAP = (("tools", "dpo"), ("sharegpt", "reward"), ("chats, whole", "kto"))


@pytest.mark.filterwarnings("ignore")  # TRL's own
@pytest.mark.parametrize(
    ("form", "method"), swept([(f, m) for f in PAIRS for m in ("dpo", "kto", "reward")], *CHEAP)
)
def test_trl_makes_of_pairs_what_they_say(
    form: str, method: str, base: Path, tmp_path: Path
) -> None:
    row, (prompt, chosen, rejected) = PAIRS[form]
    tokenizer = characters(CHATML)
    plain = {key: value for key, value in row.items() if key not in ("tools", "id")}
    rows = rows_for(method, [row, plain], tokenizer=tokenizer)
    made = trained(method, rows, tokenizer, base, tmp_path)
    expected: dict[str, list[Any]] = {
        "dpo": [prompt, chosen, rejected],
        "kto": [prompt, chosen, True],
        "reward": [prompt + chosen, prompt + rejected],
    }
    columns = {
        "dpo": ("prompt_ids", "chosen_ids", "rejected_ids"),
        "kto": ("prompt_ids", "completion_ids", "label"),
        "reward": ("chosen_ids", "rejected_ids"),
    }
    found = [made[0][column] for column in columns[method]]
    decoded = [tokenizer.decode(ids) if isinstance(ids, list) else ids for ids in found]
    assert decoded == expected[method]
    if method == "dpo":
        shown = previews(rows[0], Tokenization.of(tokenizer))
        assert shown["chosen"].ids == made[0]["prompt_ids"] + made[0]["chosen_ids"]
        assert [t for t in shown["rejected"].labels if t != -100] == made[0]["rejected_ids"]


def test_labels_and_prompts() -> None:
    labels = [True, False, 1, 0, "true", "False", "1"]
    rows = [{"prompt": "q", "completion": "a", "label": label, "id": 1} for label in labels]
    made = rows_for("kto", rows)
    assert made["label"][:] == [True, False, True, False, True, False, True]
    assert made.column_names == ["prompt", "completion", "label"]
    extra = [{"prompt": [user("q")], "answer": {"a": 1}}, {"prompt": [user("r")], "answer": 2.5}]
    made = rows_for("grpo", extra)
    assert list(made) == extra, "what a reward function is given"
    shown = previews(made[0], Tokenization.of(characters(CHATML)))["prompt"]
    assert set(shown.labels) == {-100}
    margins = [{"chosen": "qa", "rejected": "qb", "margin": m} for m in (1, "0.5", 2.0)]
    assert rows_for("reward", margins)["margin"][:] == [1.0, 0.5, 2.0]


def test_a_reward_model_reads_whole_texts() -> None:
    """Of which nothing has to be a prompt; TRL could not join an empty one to chats."""
    chats = {"chosen": [user("q"), says("a")], "rejected": [user("r"), says("b")]}
    assert list(rows_for("reward", [chats])) == [chats]
    both = [{"prompt": "q ", "chosen": "a", "rejected": "b"}, {"chosen": "r c", "rejected": "s"}]
    assert list(rows_for("reward", both)) == [
        {"chosen": "q a", "rejected": "q b"},
        both[1],
    ]


PAIR = {"chosen": "q a", "rejected": "q b"}
WRONG: dict[str, tuple[str, list[Any], str]] = {
    "no such method": ("ppo", [PAIR], "there is no method 'ppo': expected sft, dpo, orpo"),
    "sft for dpo": ("dpo", [{"prompt": "q", "completion": "a"}], "dpo trains on chosen and.* sft"),
    "chats for grpo": ("grpo", [{"messages": [user("q"), says("a")]}], "a prompt, .* are for sft"),
    "kto for reward": (
        "reward", [{"prompt": "q", "completion": "a", "label": True}], "for sft or kto",
    ),
    "pairs for sft": ("sft", [PAIR], "pairs, which --method dpo"),
    "unknown": ("kto", [{"question": "q"}], "kto trains on a prompt, a completion and a label"),
    "a label": ("kto", [{"prompt": "q", "completion": "a", "label": 0.5}], "0.5 in 'label'"),
    "no label": (
        "kto",
        [{"prompt": "q", "completion": "a", "label": True}, {"prompt": "q", "completion": "a"}],
        "row 1 .* no 'label'",
    ),
    "a margin": ("reward", [{**PAIR, "margin": "much"}], "'much' in 'margin': expected a number"),
    "no number": ("dpo", [{**PAIR, "chosen": 5}], "row 0 .* 5 in 'chosen': expected a text"),
    "mixed": (
        "dpo", [{"prompt": [user("q")], "chosen": "a", "rejected": "b"}], "a text in 'chosen' and",
    ),
    "mixed rows": (
        "dpo",
        [PAIR, {"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}],
        "row 1 .* has chats, and row 0 has texts",
    ),
    "another prompt": (
        "dpo",
        [{"prompt": "z", "chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}],
        "a chat in 'chosen' that does not begin with it",
    ),
    "nothing in common": ("orpo", [{"chosen": "a", "rejected": "b"}], "no prompt, and chosen and"),
    "no prompt": ("rloo", [{"prompt": ""}], "row 0 .* nothing in 'prompt'"),
    "a user's answer": (
        "cpo",
        [{"prompt": [user("q")], "chosen": [user("a")], "rejected": [says("b")]}],
        "'chosen' ending with a turn of the user",
    ),
    "nothing left": ("dpo", [{"chosen": "a", "rejected": "a"}], "leaves something .* are the same"),
    "images": ("dpo", [{**PAIR, "images": ["a.png"]}], "dpo is trained on rows of text"),
    "a weight": (
        "dpo",
        [{"prompt": [user("q")], "chosen": [{**says("a"), "weight": 0}], "rejected": [says("b")]}],
        "a turn of weight 0 in 'chosen'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_rows_that_cannot_be_used(wrong: str, tmp_path: Path) -> None:
    method, rows, said = WRONG[wrong]
    with pytest.raises(UserError, match=said):
        rows_for(method, rows)
    if method in METHODS and wrong != "nothing left":
        with pytest.raises(UserError, match=said):
            check_first_rows(str(write(tmp_path / "r.jsonl", rows)), "train", method=method)


def test_what_is_left_out_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q", "chosen": "", "rejected": "b"},
    ]
    assert len(rows_for("dpo", rows)) == 1
    assert "chosen and rejected that are the same, which say nothing, in 1 of 3" in caplog.text
    assert "an empty chosen, rejected or completion, which is left out, in 1 of 3" in caplog.text
    tooled = {"prompt": [user("q")], "chosen": [says("a")], "rejected": [says("b")], "tools": TOOLS}
    assert "tools" not in rows_for("orpo", [tooled]).column_names
    assert "a value of 'tools' that no chat template is given," in caplog.text


def test_nulls_that_a_template_would_show_are_refused() -> None:
    """Arrow unites the arguments of two tools; TRL would train on nulls."""
    rows = [
        {"prompt": [user("q")], "chosen": [call], "rejected": [says("b")]}
        for call in (calls(a=1), calls(b=2))
    ]
    tokenizer = characters(CHATML)
    for known in (None, tokenizer):
        with pytest.raises(UserError, match="which TRL would be given as nulls"):
            rows_for("dpo", rows, tokenizer=known)
    same = [{**row, "chosen": [calls(a=n)]} for n, row in enumerate(rows)]
    assert len(rows_for("dpo", same, tokenizer=tokenizer)) == 2
    assert list(rows_for("grpo", rows))[1]["chosen"] == [calls(b=2)], "a reward function sees it"


def test_options_of_some_rows_alone() -> None:
    row = {"prompt": [user("q")], "chosen": [says("a")], "rejected": [says("b")]}
    rows = [row, {**row, "chat_template_kwargs": {"style": "x"}}]
    optional = characters(SWITCHED.replace("style is defined", "style"))
    assert rows_for("dpo", rows, tokenizer=optional)[1]["chat_template_kwargs"] == {"style": "x"}
    with pytest.raises(UserError, match=r"example 0 .* options with other keys"):
        rows_for("dpo", rows, tokenizer=characters(SWITCHED))


def test_a_template_that_refuses_a_chat() -> None:
    row = {"prompt": [user("q")], "chosen": [says("a")], "rejected": [says("b")]}
    with pytest.raises(UserError, match="the tokenizer has no chat template"):
        rows_for("dpo", [row], tokenizer=characters())
    strict = characters("{{ raise_exception('no users here') }}")
    with pytest.raises(UserError, match=r"example 0 .* into the chat template: no users here"):
        rows_for("dpo", [row], tokenizer=strict)


def test_streams_and_mixtures() -> None:
    rows = [{"prompt": "q", "chosen": f"a{n}", "rejected": "b", "id": n} for n in range(3)]
    stream = IterableDataset.from_generator(lambda: iter(rows))
    made = rows_for("dpo", stream)
    assert list(made) == [{k: v for k, v in row.items() if k != "id"} for row in rows]
    with pytest.raises(UserError, match="trainer for orpo takes no streams"):
        rows_for("orpo", stream)
    whole = [{"chosen": "q a", "rejected": "q b"}]
    both = Mixture(("a", "b"), (Dataset.from_list(rows), whole))
    assert len(rows_for("dpo", both)) == 4
    chats = [{"chosen": [user("q"), says("a")], "rejected": [user("q"), says("b")]}]
    with pytest.raises(UserError, match=r"of several forms, texts in .* and chats in"):
        rows_for("dpo", Mixture(("a", "b"), (Dataset.from_list(rows), chats)))
    assert rows_for("sft", Mixture(("a",), ([{"text": "a"}],))).names == ("a",)
    with pytest.raises(UserError, match=r"row 0 of the train \(b\) dataset"):
        rows_for("dpo", Mixture(("a", "b"), (Dataset.from_list(rows), [{"text": "a"}])))
