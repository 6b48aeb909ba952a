"""`leanlift eval` on several datasets: what each is alone, and how far models are from the base."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
from asked import ROWS
from command import complaint
from safetensors.torch import load_file, save_file
from snapshots import assert_screen
from tiny import load, make_tokenizer

from leanlift import UserError, load_adapter, merge_adapter
from leanlift.cli import eval as evaluating
from leanlift.cli import main
from leanlift.cli.eval_data import Data, read_data
from leanlift.cli.eval_several import several_text, short_names
from leanlift.evaluation.answers import losses_of
from leanlift.evaluation.evaluate import to_samples
from leanlift.model import scale_adapter
from leanlift.paired import change
from leanlift.rows.source import load_rows

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}{% if m.role == 'assistant' %}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
PROSE = "It was the best of times, it was the worst of times. " * 8


@pytest.fixture
def prose(tmp_path: Path) -> Path:
    path = tmp_path / "prose.txt"
    path.write_text(PROSE)
    return path


def measured(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", "--max_new_tokens", "3", "--json", *map(str, argv)]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_each_is_what_it_is_alone_and_the_change_is_paired(
    base: Path,
    data: Path,
    adapter: Path,
    prose: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one = ("--adapter", adapter, "--base", "--max_length", "64")
    alone = [measured(capsys, *one, "--data", path) for path in (data, prose)]
    loads, real = [], evaluating.load_model
    monkeypatch.setattr(
        evaluating, "load_model", lambda *a, **more: loads.append(a) or real(*a, **more)
    )
    out = prose.with_name("answers.jsonl")
    both = ("--data", f"target={data}", "--data", prose, "--predictions", out)
    found = measured(capsys, *one, *both)
    assert len(loads) == 1
    assert [each["name"] for each in found["datasets"]] == ["target", "prose"]
    assert [each["is_text"] for each in found["datasets"]] == [False, True]
    for each, expected in zip(found["datasets"], alone, strict=True):
        assert (each["rows"], each["tokens"]) == (expected["rows"], expected["tokens"])
        assert each["compared"] == expected["compared"]
        for model, single in zip(each["models"], expected["models"], strict=True):
            keys = ("name", "loss", "perplexity", "exact_match", "judged", "generated")
            assert {key: model[key] for key in keys} == {key: single[key] for key in keys}
    assert found["compared_with"] == "base"
    model, tokenizer = load_adapter(load(base), adapter), make_tokenizer()
    for each, path in zip(found["datasets"], (data, prose), strict=True):
        samples = to_samples(load_rows(str(path)), tokenizer, window=64)
        before = losses_of(scale_adapter(model, 0.0).eval(), samples, 8)
        after = losses_of(scale_adapter(model, 1.0).eval(), samples, 8)
        expected = change(before, after, [sample.trained for sample in samples])
        assert expected is not None
        assert each["models"][0]["loss_change"] is None
        assert each["models"][1]["loss_change"] == pytest.approx(expected.to_dict(), rel=1e-3)
    assert found["datasets"][1]["models"][1]["exact_match_change"] is None
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["dataset"] for row in written] == ["target"] * len(ROWS)


def test_all_four_side_by_side_fit_the_screen(
    adapter: Path, data: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merged = tmp_path / "merged"
    merge_adapter(adapter, merged, dtype="float32", onto="quantized", progress=False)
    argv = ["--adapter", adapter, "--base", "--base_as_stored", "--merged", merged]
    argv += ["--data", f"a name that is very long={data}", "--data", prose, "--limit", "3"]
    argv += ["--max_length", "64"]
    assert main(["eval", "--max_new_tokens", "2", *map(str, argv)]) == 0
    shown = capsys.readouterr().out
    table = shown[shown.index("─") :].partition("\n\n")[0].splitlines()
    assert max(map(len, table)) <= 80
    assert sum(line.startswith("  prose") for line in table) == 3  # a text has no exact match
    assert "3 windows" in shown
    assert "The first of a name that is very long with an answer" in shown


def test_the_screen() -> None:
    def model(name: str, loss: float, right: float | None, moved: Any) -> dict[str, Any]:
        found = {"name": name, "loss": loss, "perplexity": 2.718**loss, "exact_match": right}
        return {**found, "loss_change": moved and dict(zip(("mean", "error"), moved, strict=True))}

    datasets = [
        {"name": "target", "data": "gsm8k_test.json", "is_text": False, "rows": 1319,
         "units": 1319, "tokens": 163_000, "compared": "Exact match compares the last numbers.",
         "models": [
            model("base", 0.9874, 0.031, None),
            model("base + adapter", 0.5912, 0.274, (-0.3962, 0.0113)),
            model("merged", 0.5713, 0.281, (-0.4161, 0.0121))]},
        {"name": "prose", "data": "texts/prose.txt", "is_text": True, "rows": 120,
         "units": 120, "tokens": 122_000, "compared": None, "models": [
            model("base", 2.314, None, None),
            model("base + adapter", 2.349, None, (0.0353, 0.0041)),
            model("merged", 2.291, None, (-0.0231, 0.0052))]},
    ]  # fmt: skip
    names = [each["name"] for each in datasets[0]["models"]]  # type: ignore[attr-defined]
    found = {
        "model": "Qwen/Qwen2.5-7B", "adapter": "runs/math", "compared_with": "base",
        "datasets": datasets, "models": [{"name": name, "seconds": 61.2} for name in names],
    }  # fmt: skip
    answers = {name: f"It is {number}." for number, name in enumerate(names)}
    row = {"dataset": "target", "prompt": "1 + 1 = ", "expected": "2", "answers": answers,
           "right": {name: text == "It is 2." for name, text in answers.items()}}  # fmt: skip
    weights = ["NF4", "NF4 + offsets", "as stored"]
    assert_screen(several_text(found, weights, [row], False), "eval-several")


def test_names_that_are_cut_tell_datasets_apart() -> None:
    cases = [
        ["target", "a name that is very long"],
        ["validation_split_a", "validation_split_b", "test"],
        [f"validation_{n}_split_of_rows" for n in range(12)],
    ]
    for names in cases:
        short = short_names(names)
        assert list(short) == names
        assert len(set(short.values())) == len(names)
        assert max(map(len, short.values())) <= 14
    assert short_names(cases[0])["a name that is very long"] == "a name that i…"
    assert short_names(cases[1])["validation_split_b"] == "valida…plit_b"


# --- turns of a chat --------------------------------------------------------------------------


def chat_of(turns: int, word: str) -> dict[str, Any]:
    said = [
        [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": word * n}]
        for n in range(1, turns + 1)
    ]
    return {"messages": [turn for both in said for turn in both]}


def test_a_chat_with_all_its_turns_is_one_row_of_a_standard_error(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, chats = tmp_path / "base", tmp_path / "chats.jsonl"
    shutil.copytree(base, place)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(place)
    rows = [chat_of(turns, word) for turns, word in ((3, "yes"), (1, "no"), (4, "oh"), (2, "why"))]
    chats.write_text("\n".join(map(json.dumps, rows)))
    argv = ["--adapter", adapter, "--model_name_or_path", place, "--base", "--judge", "contains"]
    found = measured(capsys, *argv, "--data", chats, "--data", f"again={chats}")["datasets"][0]
    assert (found["rows"], found["units"]) == (10, 4)
    model = load_adapter(load(base), adapter).eval()
    sums: list[list[float]] = []
    for scale in (0.0, 1.0):
        scale_adapter(model, scale)
        of_rows = [to_samples([row], tokenizer) for row in rows]
        sums.append([math.fsum(losses_of(model, samples, 1)) for samples in of_rows])
    counts = [sum(sample.trained for sample in samples) for samples in of_rows]
    expected = change(*sums, counts)
    assert expected is not None
    assert found["models"][1]["loss_change"] == pytest.approx(expected.to_dict(), rel=1e-3)
    assert found["models"][1]["exact_match_change"] == {"mean": 0.0, "error": 0.0}
    assert main(["eval", *map(str, argv), "--max_new_tokens", "0", "--data", str(chats),
                 "--data", f"again={chats}"]) == 0  # fmt: skip
    assert "10 turns of 4 rows" in capsys.readouterr().out


# --- what a text counts as --------------------------------------------------------------------


@pytest.mark.parametrize("only", ["completion_only_loss", "assistant_only_loss"])
def test_all_of_a_text_counts_whatever_the_adapter_was_trained_on(
    adapter: Path, tmp_path: Path, only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy, texts = tmp_path / "adapter", tmp_path / "texts.jsonl"
    shutil.copytree(adapter, copy)
    (copy / "run.json").write_text(json.dumps({only: True}))
    texts.write_text("".join(json.dumps({"text": word}) + "\n" for word in ("a text", "another")))
    found = measured(capsys, "--adapter", copy, "--data", texts)
    assert found["tokens"] == len("a text") + len("another")  # all but the first, and the end


# --- a merged model of another kind -----------------------------------------------------------


def test_a_merged_model_to_which_tokens_mean_something_else_is_refused_before_a_load(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    other, small, bare = (tmp_path / name for name in ("other", "small", "bare"))
    for place in (other, small, bare):
        shutil.copytree(base, place)
    file = other / "tokenizer.json"
    held = json.loads(file.read_text())
    vocabulary = held["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(held))
    config = json.loads((small / "config.json").read_text())
    (small / "config.json").write_text(json.dumps({**config, "vocab_size": 20}))
    for file in bare.glob("tokenizer*"):
        file.unlink()
    argv = ("eval", "--model_name_or_path", str(base), "--data", str(data), "--merged")
    with monkeypatch.context() as patch:
        patch.setattr(evaluating, "load_model", lambda *a, **more: pytest.fail("loaded"))
        assert "has another tokenizer: the id 3 is 'b' to it" in complaint(
            capsys, *argv, str(other)
        )
        assert "has 20 rows in its embedding" in complaint(capsys, *argv, str(small))
    assert main([*argv, str(bare), "--max_new_tokens", "0"]) == 0


# --- losses that are none ---------------------------------------------------------------------


def test_a_loss_that_is_not_finite_is_said_and_json_stays_json(
    base: Path, data: Path, prose: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    (file,) = broken.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.norm.weight"].fill_(math.nan)
    save_file(tensors, file, {"format": "pt"})
    argv = ["--model_name_or_path", base, "--merged", broken, "--max_length", 64]
    argv += ["--data", data, "--data", prose]
    capsys.readouterr()
    assert main(["eval", "--max_new_tokens", "0", "--json", *map(str, argv)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(shown, parse_constant=lambda name: pytest.fail(name))
    for each in found["datasets"]:
        merged = each["models"][1]
        assert merged["loss"] is merged["perplexity"] is None
        assert merged["loss_change"] == {"mean": None, "error": None}
    assert f"merged, prose on prose: the loss of {found['datasets'][1]['rows']} of" in caplog.text


# --- what is wrong ----------------------------------------------------------------------------


def test_the_file_that_is_wrong_is_named_before_a_model_is_loaded(
    base: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluating, "load_model", lambda *a, **more: pytest.fail("loaded"))
    late = [{"text": "abc"}] * 30 + [{"text": 5}]
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    files = {
        "none.jsonl": None,
        "empty.txt": b"\n",
        "binary.md": b"a\0b",
        "latin.txt": b"\xe9",
        "columns.jsonl": b'{"a": 1}\n',
        "late.jsonl": "\n".join(map(json.dumps, late)).encode(),
        "chat.jsonl": json.dumps(chat).encode(),
        "rows.docx": b"a",
        "one.txt": b"a",
    }
    for name, content in files.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        argv = ["eval", "--model_name_or_path", str(base), "--data", str(data)]
        said = complaint(capsys, *argv, "--data", f"other={tmp_path / name}")
        assert name in said
        assert "rows.jsonl" not in said


def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "a=b.jsonl").touch()
    (tmp_path / "c=d").mkdir()
    expected = {
        "dir/prose.v2.txt": ("prose.v2", "dir/prose.v2.txt"),
        "prose=b.txt": ("prose", "b.txt"),
        "my prose=~/b.txt": ("my prose", "/home/me/b.txt"),
        "a=b.jsonl": ("a=b", "a=b.jsonl"),
        "x=a=b.jsonl": ("x", "a=b.jsonl"),
        "c=d/e.jsonl": ("c", "d/e.jsonl"),
        "./c=d/e.jsonl": ("e", "./c=d/e.jsonl"),
        "org/rows": ("rows", "org/rows"),
        "~/f.txt": ("f", "/home/me/f.txt"),
    }
    for given, (name, path) in expected.items():
        assert read_data([given]) == (Data(name, path),), given


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["a/x.txt", "b/x.txt"], "both called 'x'"),
        (["x=a.txt", "x.jsonl"], "both called 'x'"),
        (["=a.txt"], "expected both"),
        (["x="], "expected both"),
        (["y" * 41 + "=a.txt"], "at most 40 characters"),
        (["a\nb=a.txt"], "at most 40 characters"),
    ],
)
def test_names_that_are_none(given: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        read_data(given)
