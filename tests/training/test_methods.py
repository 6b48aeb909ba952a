"""`leanlift train --method …`: each of TRL's trainers as a run from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from command import complaint
from safetensors.torch import load_file
from sweeps import swept
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from leanlift import LiftConfig, PlanSettings, UserError, plan_memory
from leanlift.cli import main
from leanlift.cli.help import train_help
from leanlift.cli.settings import parse_train
from leanlift.methods import METHODS
from leanlift.plan import Batch
from leanlift.training.arguments import loop_class
from leanlift.training.methods import trainer_of

PREFERRED = [name for name in METHODS if name != "sft"]
REWARDS = """
def short(completions, **more):
    return [-float(len(text)) for text in completions]

def right(completions, answer, **more):
    return [float(wanted in text) for text, wanted in zip(completions, answer)]

number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory to work in, with rows for every method and a module of rewards."""
    sums = [(f"{i} plus {i} is ", str(2 * i), str(2 * i + 1)) for i in range(24)]
    rows: dict[str, list[dict[str, Any]]] = {
        "pairs": [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in sums],
        "kto": [
            {"prompt": p, "completion": (c, r)[i % 2], "label": i % 2 == 0}
            for i, (p, c, r) in enumerate(sums)
        ],
        "prompts": [{"prompt": p, "answer": c} for p, c, _ in sums],
    }
    for name, made in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "rewards_here.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(method: str) -> str:
    return {"kto": "kto.jsonl", "grpo": "prompts.jsonl", "rloo": "prompts.jsonl"}.get(
        method, "pairs.jsonl"
    )


def words(method: str, base: Path, output: str, *more: str) -> list[str]:
    generated = []
    if METHODS[method].generates:
        generated = ["--reward_funcs", "rewards_here:short", "rewards_here:right",
                     "--num_generations", "2", "--max_completion_length", "6"]  # fmt: skip
    return [
        "train", "--method", method, "--model_name_or_path", str(base), "--dataset_name",
        rows_of(method), "--output_dir", output, "--max_steps", "4", "--refresh_interval", "2",
        "--use_cpu", "true", "--bf16", "false", "--dtype", "float32", "--save_steps", "2",
        "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2",
        "--log_format", "plain", "--learning_rate", "1e-2", *generated, *more,
    ]  # fmt: skip


@pytest.mark.parametrize("method", swept(PREFERRED, "dpo"))
def test_a_run_trains_merges_and_goes_on(base: Path, place: Path, method: str) -> None:
    (place / "prose.txt").write_text("It was the best of times. " * 12)
    keep = () if method == "reward" else ("--keep_dataset_name", "prose.txt")
    assert main(words(method, base, "run", "--merged_dir", "merged", *keep)) == 0
    report = json.loads((place / "run" / "memory.json").read_text())
    planned, measured = report["plan"]["phases"], report["phases"]["train"]["tensors"]
    assert 0.6 * planned["train"] <= measured
    assert measured <= 1.02 * max(planned["train"], planned.get("generate", 0))
    assert json.loads((place / "run" / "run.json").read_text())["method"] == method
    found = load_file(place / "run" / "adapter_model.safetensors")
    assert any("settled" in key for key in found) or method in ("grpo", "rloo")
    kind = AutoModelForSequenceClassification if method == "reward" else AutoModelForCausalLM
    stock = kind.from_pretrained(place / "merged", dtype=torch.float32)
    if method == "reward":
        head = found["score.values"].view_as(stock.score.weight)
        assert torch.equal(stock.score.weight.data.half(), head.half())

    (place / "again").mkdir()
    (place / "run" / "checkpoint-2").rename(place / "again" / "checkpoint-2")
    assert main(words(method, base, "again", "--resume_from_checkpoint", "true", *keep)) == 0
    again = load_file(place / "again" / "adapter_model.safetensors")
    assert found.keys() == again.keys()
    assert all(torch.equal(found[key], again[key]) for key in found)
    if keep:
        one, two = (
            json.loads((place / name / "run.json").read_text()) for name in ("run", "again")
        )
        assert one["kept"] == two["kept"]
        assert one["kept"][0]["tokens"] == 12 * 26 - 1
        assert 3 < one["kept"][0]["before"] < 6
        assert 0 < abs(one["kept"][0]["change"]) < 2


@pytest.mark.parametrize("method", swept(PREFERRED, "kto"))
def test_a_dry_run_looks_at_it(
    base: Path, place: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(method, base, "run", "--dry_run")) == 0
    said = capsys.readouterr().out
    assert "Ready: leanlift train --method" in said
    assert "first row" in said
    assert not (place / "run").exists()


def wrong(*more: str, method: str = "dpo") -> tuple[str, tuple[str, ...]]:
    return method, more


WRONG = [
    (wrong("--reward_funcs", "rewards_here:short"), "reward_funcs are for grpo and rloo"),
    (wrong("--reward_funcs", "no_such:short", method="grpo"), "there is no module no_such"),
    (wrong("--reward_funcs", "rewards_here:none", method="grpo"), "has no function none"),
    (wrong("--reward_funcs", "rewards_here:number", method="grpo"), "has a int number"),
    (wrong("--use_vllm", "true", method="grpo"), "use_vllm would serve the base"),
    (wrong("--sync_ref_model", "true"), "sync_ref_model copies"),
    (
        wrong("--selector", "gradient", "--refresh_interval", "0"),
        "looks at rows whose next tokens are trained",
    ),
    (wrong("--quantize_embeddings", "true"), "keeps no dense output head"),
    (wrong("--modules_to_save", "lm_head"), "would be trained nowhere"),
    (wrong("--formatting_func", "rewards_here:short"), "makes texts for sft"),
    (wrong("--dataset_name", "prompts.jsonl"), "columns ['answer', 'prompt']"),
    (wrong("--packing", "true"), "--packing is no option"),
    (wrong("--num_generations", "2"), "--num_generations is no option"),
    (wrong("--beta", "much"), "--beta"),
]


@pytest.mark.parametrize(("asked", "said"), WRONG)
def test_what_goes_with_another_method_is_said_at_once(
    base: Path, place: Path, asked: Any, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    method, more = asked
    argv = words(method, base, "run")
    for name in more[::2]:
        if name in argv:
            at = argv.index(name)
            del argv[at : at + (3 if name == "--reward_funcs" else 2)]
    assert main([*argv, *more]) == 2
    assert said in capsys.readouterr().err
    assert not (place / "run").exists()


def test_rows_of_pairs_are_refused_for_imitation(
    base: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = words("dpo", base, "run")
    argv[argv.index("dpo")] = "sft"
    assert main(argv) == 2
    assert "--method dpo, orpo, cpo or reward" in capsys.readouterr().err


def test_a_file_of_settings_may_name_the_method(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(f"method: dpo\nmodel_name_or_path: {base}\ndataset_name: x.json\nbeta: 0.3\n")
    args, loop = parse_train(["--config", str(file), "--use_cpu", "true"])
    assert (args.method, loop.beta, loop.learning_rate) == ("dpo", 0.3, 2e-5)
    assert isinstance(loop, loop_class("dpo"))
    args, loop = parse_train(
        ["--model_name_or_path", str(base), "--dataset_name", "x.json", "--method", "grpo",
         "--reward_funcs", "a:b", "--use_cpu", "true"]
    )  # fmt: skip
    assert args.selector == "random"
    assert args.reward_funcs == ("a:b",)


@pytest.mark.parametrize("method", METHODS)
def test_help_has_the_settings_of_a_method(method: str) -> None:
    some, every = train_help(False, method), train_help(True, method)
    assert some is not None
    assert every is not None
    assert "--reward_funcs" in some
    assert ("--beta " in some) == (method in ("dpo", "kto", "orpo", "cpo", "grpo", "rloo"))
    assert ("--packing " in some) == (method == "sft")
    assert max(map(len, some.splitlines())) <= 80


def test_every_trainer_is_ours_and_trl_s() -> None:
    for method, known in METHODS.items():
        names = [kind.__name__ for kind in trainer_of(method).__mro__]
        assert known.trainer in names
        assert "LiftRun" in names


@pytest.mark.thorough
def test_a_plan_of_pairs_has_both_passes_and_generation_its_cache(tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=256, intermediate_size=512, num_hidden_layers=3,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=8000,
    )  # fmt: skip
    config.save_pretrained(tmp_path)

    def plan(method: str, rows: int, tokens: int) -> Any:
        settings = PlanSettings(
            largest=Batch(rows, tokens), cuda=True, gradient_accumulation_steps=1
        )
        return plan_memory(tmp_path, LiftConfig(selector="random"), settings, method=method)

    assert plan("dpo", 2, 64).phases["train"] > plan("sft", 2, 64).phases["train"]
    assert "generate" not in plan("dpo", 2, 64).phases
    short, long = (plan("grpo", 4, tokens).phases["generate"] for tokens in (256, 512))
    cache = 2 * 3 * 4 * 256 * 256 * 2  # keys and values, blocks, rows, tokens, width, bf16
    assert cache <= long - short <= 3 * cache  # and what one block makes of the tokens
    with pytest.raises((UserError, KeyError)):
        plan("none", 1, 16)


CARDS = [("dpo", "2.8GB"), ("grpo", "1.8GB"), ("reward", "0.93GB")]


@pytest.mark.parametrize(("method", "card"), swept(CARDS, CARDS[2]))
def test_a_card_that_is_too_small_gets_other_settings(
    tmp_path: Path, method: str, card: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=1024, intermediate_size=2048, num_hidden_layers=2,
        num_attention_heads=8, num_key_value_heads=8, vocab_size=64000, tie_word_embeddings=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    argv = ["plan", "--method", method, "--model_name_or_path", str(tmp_path), "--fit", card]
    assert main([*argv, *(["--reward_funcs", "a:b"] if method == "grpo" else [])]) == 0
    said = capsys.readouterr().out
    assert "embedding_on_cpu=true" in said
    assert "quantize_embeddings" not in said  # which their trainers cannot have


def test_a_reward_model_keeps_nothing(
    base: Path, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "prose.txt").write_text("a text")
    asked = words("reward", base, "run", "--keep_dataset_name", "prose.txt")
    assert "a reward model does not predict" in complaint(capsys, *asked)
    assert not (place / "run").exists()
