"""Results of another base, or of other rows, are not gone on with; bad input is one sentence."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from paper_suites import PEFTS, places
from safetensors.torch import load_file, save_file
from tiny import make_checkpoint

pytest.importorskip("peft")

from benchmarks.quality import __main__ as command
from benchmarks.quality.identity import check_same, weights_mark
from benchmarks.quality.paper.given import check
from benchmarks.quality.paper.rows import texts_of
from benchmarks.quality.paper.stages import Asked
from benchmarks.quality.real import main
from benchmarks.quality.real.plan import REAL
from benchmarks.quality.real.run import Runner
from benchmarks.quality.real.texts import Lengths
from leanlift.errors import UserError
from leanlift.evaluation.answers import Sample

PRESET = replace(REAL, lengths=Lengths(longest=192, valid=2, test=3, source=2, probes=1))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("identity") / "base")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return rows_of(tmp_path / "rows.json", "+")


def rows_of(path: Path, sign: str, begin: str = "It is ") -> Path:
    rows = [{"instruction": f"{n}{sign}{n}", "output": f"{begin}{n}."} for n in range(10, 40)]
    path.write_text(json.dumps(rows))
    return path


def retrained(base: Path, place: Path) -> Path:
    """A twin of the same name, of whose weights one matrix differs."""
    twin = place / base.name
    shutil.copytree(base, twin)
    (file,) = twin.glob("*.safetensors")
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(tensors, file, {"format": "pt"})
    return twin


@pytest.mark.filterwarnings("ignore:.*save_precomputed_indices")
def test_runs_of_another_base_or_of_other_rows_are_not_gone_on_with(
    base: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(main, "jobs", lambda preset: [])

    def real(model: Path, rows: Path) -> None:
        main.real(model, rows, tmp_path, "tiny", PRESET, processes=1, claims=None, given=[])

    real(base, data)
    written = (tmp_path / "results" / "tiny.csv").read_bytes()
    real(base, data)
    twin, other = retrained(base, tmp_path), rows_of(tmp_path / "other.json", "-")
    for model, rows, said in ((twin, data, "the model"), (base, other, "the rows")):
        with pytest.raises(UserError, match=f"results of the same name by {said} that differ"):
            real(model, rows)
    (tmp_path / "results" / "tiny_of.json").unlink()  # of runs that were made without it
    with pytest.raises(UserError, match=r"tiny\.csv has runs of other rows"):
        real(base, rows_of(other, "+", "It is not "))
    monkeypatch.setattr(Runner, "bases", lambda self: pytest.fail("began"))
    with pytest.raises(pytest.fail.Exception, match="began"):
        real(base, data)
    assert (tmp_path / "results" / "tiny.csv").read_bytes() == written


def test_weights_are_known_by_what_is_in_them(base: Path, tmp_path: Path) -> None:
    (tmp_path / "copy").mkdir()
    same, other = tmp_path / "copy" / "another name", retrained(base, tmp_path)
    shutil.copytree(base, same)
    assert weights_mark(base) == weights_mark(same) != weights_mark(other)
    check_same(tmp_path / "note.json", {"the model": "a"})
    check_same(tmp_path / "note.json", {"the model": "a", "the rows": "b"})
    with pytest.raises(UserError, match="by the model and the rows that differ"):
        check_same(tmp_path / "note.json", {"the model": "b", "the rows": "c"})


def test_results_of_a_test_set_and_of_a_text_are_known_by_what_is_in_them() -> None:
    def asked(answer: str = "1", text: str = "a text", limit: int | None = None) -> Asked:
        tests = {"gsm8k": [Sample([1, 2], [], [], answer, answer)]}
        return Asked(PEFTS, None, tests, limit, ("name.txt", [text]))

    one = asked()
    assert one.test_mark("gsm8k") == asked(text="another").test_mark("gsm8k")
    others = (asked("2"), asked(limit=1))
    assert all(one.test_mark("gsm8k") != other.test_mark("gsm8k") for other in others)
    assert one.text_mark == asked("2").text_mark != asked(text="another").text_mark


def test_a_base_of_the_text_domain_is_that_of_its_files(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Files of the same names with other rows; and one that has none of questions."""
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "base_of", lambda *given: pytest.fail("began"))
    source, cache = rows_of(tmp_path / "source.json", "-"), str(tmp_path / "cache")
    argv = ["--source", str(source), "--data", str(data), "--cache", cache]
    with pytest.raises(pytest.fail.Exception, match="began"):
        command.main(argv)
    rows_of(source, "less")
    for results in ("results", "others"):
        monkeypatch.setattr(command, "RESULTS", tmp_path / results)
        with pytest.raises(SystemExit, match="2"):
            command.main(argv)
        assert "of the same name by --source that differ" in capsys.readouterr().err
        (tmp_path / "others").mkdir(exist_ok=True)
    source.write_text('[{"text": "a"}]')
    with pytest.raises(SystemExit, match="2"):
        command.main(argv)
    assert "row 0 of" in capsys.readouterr().err


# --- what is wrong ----------------------------------------------------------------------------


def broken(base: Path, place: Path, change: Callable[[Path], Any]) -> str:
    shutil.copytree(base, place)
    change(place)
    return str(place)


def test_the_real_preset_refuses_in_one_sentence(
    base: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(Runner, "bases", lambda self: pytest.fail("began"))
    monkeypatch.setattr(main, "RESULTS", tmp_path / "results")
    latin, pairs = tmp_path / "latin.txt", tmp_path / "pairs.jsonl"
    latin.write_bytes(b"\xe9")
    pairs.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    no_config = broken(base, tmp_path / "a", lambda p: (p / "config.json").write_text("{"))
    no_tokens = broken(base, tmp_path / "b", lambda p: (p / "tokenizer.json").write_text("{"))
    cases = [
        (["--data", str(latin), "--model", str(base)], "it is not UTF-8"),
        (["--data", str(pairs), "--model", str(base)], "chosen and rejected are pairs"),
        (["--data", str(data), "--model", no_config], "is no checkpoint of a language model"),
        (["--data", str(data), "--model", no_tokens], "cannot be loaded"),
        (["--data", str(data), "--model", str(base), "--jobs", "0"], "--jobs of at least 1, got 0"),
    ]
    for given, said in cases:
        with pytest.raises(SystemExit, match="2"):
            command.main(["--preset", "real", *given])
        last = capsys.readouterr().err.splitlines()[-1]
        assert said in last, given
    assert not (tmp_path / "results").exists()


def test_the_paper_preset_finds_test_sets_whatever_their_case_and_refuses_rates_that_are_none(
    base: Path, tmp_path: Path
) -> None:
    given = places(tmp_path, base)
    (file,) = given.tests.iterdir()
    file.rename(file.with_name("GSM8K.JSONL"))
    assert list(given.test_files(PEFTS)) == ["gsm8k"]
    check(given, PEFTS)
    for wrong in (
        replace(given, loop={"learning_rate": float("nan")}),
        replace(given, loop={"learning_rate": -1.0}),
        replace(given, tflops=0.0),
    ):
        with pytest.raises(UserError, match=r"expected a --(lr|tflops) above 0"):
            check(wrong, PEFTS)


def test_texts_that_forgetting_is_measured_on(tmp_path: Path) -> None:
    place = tmp_path / "a.md"
    place.write_bytes(b"\xef\xbb\xbfone\r\n***\r\ntwo\nlines\n")
    assert texts_of(place) == ["one", "two\nlines"]
    for content, said in ((b"caf\xe9", "not UTF-8"), (b"a\0b", "NUL bytes")):
        place.write_bytes(content)
        with pytest.raises(UserError, match=said):
            texts_of(place)
