"""A run's report: as text, as a comparison, as a page; from files that anyone may have written."""

from __future__ import annotations

import copy
import json
import re
from html import unescape
from pathlib import Path
from shutil import copyfile
from typing import Any

import pytest
import torch
from command import complaint
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from reported import SETTINGS, STATE, put
from snapshots import assert_screen

from leanlift import UserError
from leanlift.adapters import open_adapter
from leanlift.cli import main
from leanlift.cli.info import describe
from leanlift.report.adapter import read_adapter
from leanlift.report.compare import compare_runs
from leanlift.report.data import read_run
from leanlift.report.page import page
from leanlift.report.text import report_text
from leanlift.sparse import SegmentedIndex

# --- the adapter, by numpy --------------------------------------------------------------------


def test_numpy_reads_what_torch_reads(adapter: Path) -> None:
    facts = read_adapter(adapter)
    with open_adapter(adapter) as opened:
        assert [m.module for m in facts.matrices] == list(opened.base.shapes)
        for matrix in facts.matrices:
            offsets = opened.layer(matrix.module)
            values = torch.cat([store.values.double() for store in offsets.stores])
            assert matrix.entries == offsets.active.index.count
            assert matrix.retired == (offsets.retired.index.count if offsets.retired else 0) > 0
            assert matrix.nbytes == sum(store.nbytes for store in offsets.stores)
            assert matrix.mean == pytest.approx(float(values.abs().mean()), rel=1e-12)
            assert matrix.norm == pytest.approx(float(values.norm()), rel=1e-12)
            assert matrix.largest == float(values.abs().max())
            places = torch.cat([store.index.to_flat() for store in offsets.stores])
            assert matrix.at == divmod(int(places[values.abs().argmax()]), matrix.shape[1])
    counted = read_adapter(adapter, offsets=False)
    assert [(m.module, m.entries, m.retired) for m in counted.matrices] == [
        (m.module, m.entries, m.retired) for m in facts.matrices
    ]
    assert facts.dtype == "float32"
    assert facts.formats == ("nf4+double",)
    assert describe(adapter)["form"] == "leanlift"


@given(st.integers(1, 9), st.integers(1, 700), st.randoms(use_true_random=False))
def test_positions_are_decoded_as_the_index_encodes_them(m: int, n: int, chance: Any) -> None:
    from leanlift.report.adapter import _position, _wrong_index

    flat = sorted(chance.sample(range(m * n), chance.randint(1, min(m * n, 40))))
    index = SegmentedIndex.from_flat(torch.tensor(flat), (m, n))
    columns, counts = index.columns.numpy(), index.counts.numpy()
    assert _wrong_index(columns, counts, (m, n), len(flat)) is None
    assert [_position(columns, counts, i) for i in range(len(flat))] == [divmod(f, n) for f in flat]


# --- text -------------------------------------------------------------------------------------


def test_the_screen_of_a_report(run: Path) -> None:
    config = json.loads((run / "adapter_config.json").read_text())
    config["base"]["name"] = "Qwen/Qwen2.5-7B"
    (run / "adapter_config.json").write_text(json.dumps(config))
    assert_screen(report_text(read_run(run)), "report", {re.escape(str(run)): "RUN"})


def test_the_screen_of_a_comparison(tmp_path: Path) -> None:
    slow = copy.deepcopy(STATE)
    for log in slow["log_history"]:
        log.update({key: log[key] * 1.2 for key in ("loss", "eval_loss") if key in log})
    first = put(tmp_path / "lr-2e-4")
    second = put(
        tmp_path / "lr-1e-4",
        **{"run.json": {**SETTINGS, "learning_rate": 1e-4}, "trainer_state.json": slow},
    )
    third = put(tmp_path / "no-memory", **{"memory.json": None})
    assert main(["report", str(first), str(second), str(third)]) == 0
    from leanlift.report.compare import compare_text

    runs = [read_run(path) for path in (first, second, third)]
    assert_screen(compare_text(runs), "report-compare")
    data = compare_runs(runs)
    assert data["settings"] == {"learning_rate": ["0.0002", "0.0001", "0.0002"]}
    assert data["results"]["peak of training"][2] is None
    with pytest.raises(UserError, match="at most 4 runs"):
        compare_runs(runs * 2)


PARTS = ("memory.json", "trainer_state.json", "run.json", "adapter_config.json")


@pytest.mark.parametrize("lacking", PARTS)
@pytest.mark.parametrize("how", ["missing", "no json", "other json"])
def test_what_is_not_there_is_said(run: Path, lacking: str, how: str) -> None:
    (run / lacking).unlink()
    if how != "missing":
        (run / lacking).write_text("{" if how == "no json" else '{"log_history": 1}')
    found = read_run(run)
    settings_alone = lacking == "run.json" and how == "other json"
    assert len(found.missing) == (0 if settings_alone else 1)
    for shown in (report_text(found), unescape(page(found))):
        assert all(said in " ".join(shown.split()) for said in found.missing)
    assert main(["report", str(run)]) == 0


def test_an_adapter_alone_and_a_checkpoint_have_a_report(adapter: Path) -> None:
    text = report_text(read_run(adapter))
    assert "entries, " in text
    assert "No memory was measured here." in text


def test_mistakes(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {"lora": '{"peft_type": "LORA"}', "gguf": None, "empty": None, "cut": None}
    for name, config in places.items():
        (tmp_path / name).mkdir()
        if config:
            (tmp_path / name / "adapter_config.json").write_text(config)
    (tmp_path / "gguf" / "m.gguf").write_bytes(b"GGUF")
    (tmp_path / "cut" / "checkpoint-20").mkdir()
    (tmp_path / "cut" / "checkpoint-3").mkdir()

    def refused(*argv: str) -> str:
        return complaint(capsys, "report", *argv)

    assert "not of an adapter in leanlift's own form" in refused(str(tmp_path / "lora"))
    assert "holds no memory.json" in refused(str(tmp_path / "empty"))
    assert "an empty directory" in refused(str(tmp_path / "empty"))
    assert "GGUF" in refused(str(tmp_path / "gguf"))
    assert "checkpoint-20" in refused(str(tmp_path / "cut"))
    assert "there is no such directory" in refused(str(tmp_path / "none"))
    assert "the page of one run" in refused(str(run), str(run), "--html")
    assert "is no page of leanlift" in refused(str(run), "--html", str(run / "memory.json"))
    assert "does not exist" in refused(str(run), "--html", str(tmp_path / "no" / "page.html"))


def test_a_run_that_has_not_ended_is_shown_by_its_newest_checkpoint(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (3, 20):
        there = tmp_path / f"checkpoint-{step}"
        there.mkdir()
        copyfile(run / "trainer_state.json", there / "trainer_state.json")
    assert main(["report", str(tmp_path)]) == 0
    assert "its newest checkpoint, checkpoint-20" in " ".join(capsys.readouterr().out.split())


def test_report_and_info_start_without_heavy_imports(run: Path) -> None:
    code = (
        "import sys, time, leanlift.cli as c\n"
        "assert c.main(sys.argv[1:]) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'rich', 'matplotlib', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "assert time.process_time() < 2, time.process_time()"
    )
    for argv in (
        ["report"],
        ["info"],
        ["info", "--json"],
        ["report", "--json"],
        ["report", "--html"],
    ):
        command = [argv[0], str(run), *argv[1:]]
        done = run_python("-c", code, *command)
        assert done.returncode == 0, done.stderr
