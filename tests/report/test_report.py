"""A run's report: as text, as a comparison, as a page; from files that anyone may have written."""

from __future__ import annotations

import copy
import json
import os
import random
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from html import escape, unescape
from html.parser import HTMLParser
from pathlib import Path
from shutil import copytree, which
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import run_python
from snapshots import assert_screen
from command import complaint
from tiny import load, make_checkpoint

from benchmarks.adapter_mutations import MUTATIONS
from leanlift import LiftConfig, UserError, get_lift_model, refresh_mask, save_adapter
from leanlift.adapter import open_adapter
from leanlift.cli import main
from leanlift.cli.info import describe
from leanlift.model import lift_layers
from leanlift.report.adapter import read_adapter
from leanlift.report.compare import compare_runs
from leanlift.report.data import read_run
from leanlift.report.maps import grid_of, place_of
from leanlift.report.page import page
from leanlift.report.svg import (
    Bars,
    Line,
    bar_chart,
    column_chart,
    heat_map,
    line_chart,
    thin,
    ticks,
)
from leanlift.report.text import report_text
from leanlift.sparse import SegmentedIndex

GIB = 2**30

MEMORY: dict[str, Any] = {
    "device": "NVIDIA GeForce RTX 3060",
    "phases": {
        "load": {"seconds": 41.3, "tensors": 4 * GIB, "reserved": 4 * GIB, "resident": None},
        "select": {"seconds": 93.0, "tensors": 4.5 * GIB, "reserved": 5 * GIB, "resident": None},
        "train": {"seconds": 7512.0, "tensors": 6.5 * GIB, "reserved": 7 * GIB, "resident": None},
        "export": {"seconds": 80.0, "tensors": 2 * GIB, "reserved": 3 * GIB, "resident": None},
    },
    "categories": {
        "base weights": 3.112 * GIB, "embeddings and head": 0.488 * GIB, "norms and other": 600_000,
        "index": 0.327 * GIB, "values": 0.603 * GIB, "retired entries": 0.1 * GIB,
        "gradients": 0.603 * GIB, "optimizer state": 0.613 * GIB, "scratch": 0,
        "activations and workspace": 0.65 * GIB,
    },
    "entries": 323_800_000,
    "notes": ["selection: 224 matrices in 93.0 s, 0 not converged.", "refresh: 2 in 9 s."],
    "plan": {
        "categories": {
            "base weights": 3.112 * GIB, "embeddings and head": 0.488 * GIB,
            "norms and other": 600_000, "index": 0.327 * GIB, "values": 0.603 * GIB,
            "retired entries": 0.3 * GIB, "gradients": 0.603 * GIB, "optimizer state": 0.613 * GIB,
            "scratch": 0, "activations and workspace": 0.62 * GIB,
        },
        "phases": {"load": 4 * GIB, "select": 4.4 * GIB, "train": 6.67 * GIB, "export": GIB},
    },
    "capacity": 12 * GIB,
    "versions": {"python": "3.12.4", "torch": "2.13.0"},
}  # fmt: skip
STATE: dict[str, Any] = {
    "global_step": 800,
    "log_history": [
        {"step": 0, "eval_loss": 1.62},
        *({"step": s, "loss": 0.7 + 1.6 / (1 + s / 90), "learning_rate": 2e-4 * (1 - s / 900)}
          for s in range(50, 801, 50)),
        {"step": 300, "refresh_churn": 0.124, "refresh_retired": 40_100_000,
         "refresh_held_back": 0, "refresh_seconds": 4.0},
        {"step": 600, "refresh_churn": 0.052, "refresh_retired": 55_300_000,
         "refresh_held_back": 0, "refresh_seconds": 4.0},
        {"step": 800, "eval_loss": 0.913},
        {"step": 800, "train_runtime": 7512.0, "train_loss": 1.0},
    ],
}  # fmt: skip
SETTINGS = {
    "leanlift_version": "0.1.0", "model_name_or_path": "Qwen/Qwen2.5-7B",
    "dataset_name": "rows.json",
    "density": 0.05, "learning_rate": 2e-4, "max_length": 2048, "target_modules": "all-linear",
    "eval_dataset_name": "held.json", "density_pattern": None,
}  # fmt: skip
ANSWERS = {
    "prompt": "next 48219 -> ", "expected": "59320",
    "answers": {"before": "48219", "after": "59320"}, "right": {"before": False, "after": True},
}  # fmt: skip


def whole(data: Any) -> Any:
    """The same with sizes as the integers that they are on disk."""
    if isinstance(data, dict):
        return {key: value if key == "seconds" else whole(value) for key, value in data.items()}
    return int(data) if isinstance(data, float) else data


def put(run: Path, **changes: Any) -> Path:
    """A run's directory without an adapter."""
    run.mkdir(exist_ok=True)
    parts = {
        "memory.json": whole(MEMORY), "trainer_state.json": STATE, "run.json": SETTINGS,
        "predictions.jsonl": ANSWERS, **changes,
    }  # fmt: skip
    for name, data in parts.items():
        if data is not None:
            (run / name).write_text(json.dumps(data) + "\n")
    return run


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Over NF4, with offsets that differ from matrix to matrix, after a refresh, in bfloat16."""
    work = tmp_path_factory.mktemp("report")
    config = LiftConfig(
        density=0.1, approx_rank=4, values_dtype="bfloat16", density_pattern={"down_proj": 0.02}
    )
    model = get_lift_model(load(make_checkpoint(work / "base")), config, progress=False)
    torch.manual_seed(3)
    for number, layer in enumerate(lift_layers(model).values()):
        layer.values.data.normal_(std=0.01 * (number + 1))
    refresh_mask(model)
    save_adapter(model, work / "adapter")
    return work / "adapter"


@pytest.fixture
def run(adapter: Path, tmp_path: Path) -> Path:
    copytree(adapter, tmp_path / "run")
    return put(tmp_path / "run")


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


def damage(adapter: Path, key: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors[key] = value(tensors[key]).contiguous()
    save_file(tensors, path)


NAME = "model.layers.0.mlp.up_proj"
DAMAGES: dict[str, tuple[str, Callable[[torch.Tensor], torch.Tensor], str]] = {
    "nan": ("values", lambda t: torch.full_like(t, float("nan")), "NaN or infinite"),
    "ints": ("values", lambda t: t.int(), "expected a 1-D floating tensor"),
    "short": ("values", lambda t: t[1:], "values"),
    "unsorted": ("index.columns", lambda t: t.flip(0), "is broken"),
    "twice": ("index.columns", lambda t: torch.full_like(t, 3), "not sorted or not distinct"),
    "outside": ("index.columns", lambda t: t.clamp(min=64), "is broken"),
    "rows": ("index.counts", lambda t: t[:-1], "expected counts as"),
    "floats": ("index.counts", lambda t: t.float(), "expected uint8"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_adapter_is_one_sentence(adapter: Path, tmp_path: Path, kind: str) -> None:
    part, value, said = DAMAGES[kind]
    copytree(adapter, tmp_path / "bad")
    damage(tmp_path / "bad", f"{NAME}.{part}", value)
    with pytest.raises(UserError, match=said):
        read_adapter(tmp_path / "bad")


def test_a_cut_file_is_one_sentence_wherever_it_is_cut(adapter: Path, tmp_path: Path) -> None:
    copytree(adapter, tmp_path / "bad")
    weights = tmp_path / "bad" / "adapter_model.safetensors"
    data = weights.read_bytes()
    header = 8 + int.from_bytes(data[:8], "little")
    for length in (0, 4, 8, 100, header - 1, header, header + 1, len(data) - 1):
        weights.write_bytes(data[:length])
        with pytest.raises(UserError, match="not a whole safetensors file"):
            read_adapter(tmp_path / "bad")
    weights.write_bytes((2**62).to_bytes(8, "little") + data[8:])
    with pytest.raises(UserError, match="does not fit"):
        read_adapter(tmp_path / "bad")


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


# --- strangers' files ---------------------------------------------------------------------------

HOSTILE: list[Any] = [
    None, True, -1, 2.5, 10**30, float("nan"), float("inf"), "", "\x1b[2J", "a\nb", "x" * 10_000,
    "<script>alert(1)</script>", "\ud800", [], [1], {}, {"a": 1}, [[[]]], [{"step": 1, "loss": 1}],
]  # fmt: skip


def shown_or_refused(run: Path) -> str:
    """The sentence of a run that is refused; nothing for one that has a page."""
    try:
        check_page(page(read_run(run)))
    except UserError as error:
        return str(error)
    return ""


def test_a_mutated_adapter_is_shown_or_refused(adapter: Path, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in adapter.iterdir()}
    outcomes: Counter[str] = Counter()
    for number in range(150):
        chance, damaged = random.Random(number), dict(files)
        chance.choice(MUTATIONS)(chance, damaged)
        for file in tmp_path.iterdir():
            file.unlink()
        for name, data in damaged.items():
            (tmp_path / name).write_bytes(data)
        said = shown_or_refused(tmp_path)
        outcomes["refused" if said else "shown"] += 1
        assert len(said) < 1500
    assert min(outcomes["shown"], outcomes["refused"]) > 10


def places_in(data: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [before] if before else []
    if isinstance(data, (dict, list)):
        items = data.items() if isinstance(data, dict) else enumerate(data)
        for key, value in list(items)[:8]:
            found += places_in(value, (*before, key))
    return found


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("memory.json", whole(MEMORY)),
        ("trainer_state.json", STATE),
        ("run.json", SETTINGS),
        ("predictions.jsonl", ANSWERS),
    ],
    ids=["memory", "state", "settings", "answers"],
)
def test_files_that_lie_end_in_a_report_or_a_sentence(
    tmp_path: Path, name: str, original: Any
) -> None:
    """Every value replaced by every kind of value."""
    run, tried = put(tmp_path / "run"), 0
    for place in places_in(original):
        for value in HOSTILE:
            data = copy.deepcopy(original)
            holder = data
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            (run / name).write_text(json.dumps(data))
            found = read_run(run)
            text = report_text(found)
            assert "\x1b" not in text, (place, value)
            assert len(text) < 10_000, (place, value)
            tried += 1
            if tried % 7 == 0:
                check_page(page(found).encode("utf-8", "replace").decode())
    assert tried > 100


# --- the page -----------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Tags balance, nothing is loaded from anywhere, there is no script."""

    EMPTY = ("meta", "link", "br", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.metas: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        named = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed", "img", "form"), tag
        assert not any(key.startswith("on") for key in named), named
        for key in ("href", "src", "data", "action", "xlink:href"):
            assert named.get(key) in (None, "data:,"), named
        if tag == "meta":
            self.metas.append(named)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert not re.search(r"url\(|@import|https?://", html)
    return checker


def test_the_page_is_whole_and_loads_nothing(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(run), "--html"]) == 0
    assert f"Wrote {run / 'report.html'}" in capsys.readouterr().out
    html = (run / "report.html").read_text(encoding="utf-8")
    checker = check_page(html)
    assert checker.tags["svg"] == 7  # loss, rate, refreshes, phases, categories, two maps
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in checker.metas
    assert "prefers-color-scheme: dark" in html
    for word in ("Loss", "Learning rate", "Refreshes", "Memory by phase", "Largest changes",
                 "Answers", "before: 0 of 1 right; after: 1 of 1 right", "Settings", "2048",
                 "torch 2.13.0",
                 "down_proj"):  # fmt: skip
        assert word in html, word
    assert main(["report", str(run), "--html"]) == 0  # a page of ours is replaced


def test_nothing_of_a_file_reaches_the_page_unescaped(run: Path) -> None:
    bad = "<script>alert(1)</script><img src=http://x.example/a onerror=alert(2)>\"'"
    memory = {**whole(MEMORY), "device": bad, "notes": [bad]}
    memory["phases"] = {bad: memory["phases"]["load"]}
    memory["categories"] = {**memory["categories"], bad: 2**30}
    answers = {"prompt": bad, "expected": bad, "answers": {bad: bad}, "right": {bad: True}}
    settings = {bad: bad, "model_name_or_path": bad}
    put(run, **{"memory.json": memory, "run.json": settings, "predictions.jsonl": answers})
    config = json.loads((run / "adapter_config.json").read_text())
    config["base"]["name"] = config["lift"]["selector"] = bad
    (run / "adapter_config.json").write_text(json.dumps(config))
    found = read_run(run)
    assert not found.missing
    html = page(found)
    assert "&lt;script&gt;" in html
    checker = Checker()
    checker.feed(html)
    assert "script" not in checker.tags


def browser() -> str | None:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    return os.environ.get("CHROMIUM") or next(filter(None, map(which, names)), None)


FRAME = """<!doctype html><title>waiting</title><body style="margin:0"><script>
addEventListener("load", () => {
  const said = [];
  for (const width of [390, 1280]) {
    const inside = document.getElementById("w" + width).contentDocument.documentElement;
    const over = inside.scrollWidth - inside.clientWidth;
    said.push(width + ":" + over + ":" + inside.querySelectorAll("svg").length);
    const small = [...inside.querySelectorAll("text")].filter(
      (t) => t.getBoundingClientRect().height < 9).length;
    said.push("small:" + small);
    said.push("asked:" + document.getElementById("w" + width).contentWindow.performance
      .getEntriesByType("resource").length);
  }
  document.title = said.join(" ");
});</script>
"""


@pytest.mark.skipif(browser() is None, reason="there is no Chromium here (set CHROMIUM to one)")
@pytest.mark.parametrize("dark", [False, True])
def test_a_browser_shows_the_page(run: Path, tmp_path: Path, dark: bool) -> None:
    """No console message, no request, nothing wider than a phone or a desk."""
    html = page(read_run(run))
    frames = "".join(
        f'<iframe id="w{width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{escape(html)}"></iframe>'
        for width in (390, 1280)
    )
    (tmp_path / "frame.html").write_text(FRAME + frames, encoding="utf-8")
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    command = [str(browser()), "--headless", "--no-sandbox", "--disable-gpu",
               f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr",
               f"--blink-settings=preferredColorScheme={0 if dark else 1}",
               "--disable-background-networking", "--disable-component-update"]  # fmt: skip

    def dumped(name: str) -> subprocess.CompletedProcess[str]:
        address = (tmp_path / name).as_uri()
        return subprocess.run(
            [*command, "--dump-dom", address],
            capture_output=True, text=True, timeout=90, check=True,
        )  # fmt: skip

    alone = dumped("page.html")  # what the page's policy forbids is said on the console
    said = [line for line in alone.stderr.splitlines() if "CONSOLE" in line]
    assert not said
    assert alone.stdout.count("<svg") == 7
    title = re.search(r"<title>(.*?)</title>", dumped("frame.html").stdout)
    assert title is not None
    assert title[1] == "390:0:7 small:0 asked:0 1280:0:7 small:0 asked:0"


# --- charts -------------------------------------------------------------------------------------

NUMBERS = st.floats(-1e20, 1e20)


@given(st.lists(st.tuples(st.integers(0, 10**6), NUMBERS), min_size=1, max_size=60))
def test_charts_of_any_numbers_stay_inside(points: list[tuple[int, float]]) -> None:
    points = sorted(points)
    sizes = [(float(x), abs(y)) for x, y in points]
    drawn = [
        line_chart([Line("<a>", points), Line("b", sizes, "b")], "t", "{:.3g}".format, [1.0]),
        column_chart(sizes, "t", "{:.3g}".format),
        bar_chart([Bars("x", [(y, "a", "1")]) for _, y in sizes], "t", (1.0, "card")),
        heat_map(["0"] * len(points), ["k"], [[y] for _, y in points], "t", "{:.3g}".format),
    ]
    for svg in drawn:
        check_page(svg)
        assert "nan" not in svg
        assert "inf" not in svg.replace("infinite", "")
        for key, most in (("x1", 400), ("x2", 400), ("cx", 400)):
            found = [float(value) for value in re.findall(rf' {key}="(.*?)"', svg)]
            assert all(-0.1 <= value <= most + 0.1 for value in found), (key, found)


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3, 3) == [3]
    assert thin([(i, 1.0) for i in range(1000)], 10) == [(i * 100 + 49.5, 1.0) for i in range(10)]


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("model.layers.3.mlp.up_proj", ("3", "mlp.up_proj")),
        ("transformer.h.11.attn.c_attn", ("11", "attn.c_attn")),
        ("model.layers.2.mlp.experts.7.up_proj", ("2", "mlp.experts.*.up_proj")),
        ("lm_head", ("–", "lm_head")),
    ],
)
def test_a_module_has_a_layer_and_a_kind(module: str, place: tuple[str, str]) -> None:
    assert place_of(module) == place


def test_the_grid_has_every_matrix_once(adapter: Path) -> None:
    facts = read_adapter(adapter)
    grid = grid_of(facts)
    assert (grid.layers, len(grid.kinds)) == (["0", "1"], 7)
    assert sum(map(len, grid.cells.values())) == len(facts.matrices)
