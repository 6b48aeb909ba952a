"""The page of a report, and its charts."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import subprocess
from html import escape
from pathlib import Path
from shutil import which

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pages import Checker, check_page
from reported import MEMORY, put, whole

from leanlift.cli import main
from leanlift.report.adapter import read_adapter
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


@pytest.mark.thorough
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
@example([(0, 5e-324)])
@example([(0, 0.0), (1, 2.2e-308), (2, -5e-324)])
@example([(0, 1e20), (1, 5e-324)])
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
    extremes = [0.0, 5e-324, 2.2e-308, 1e-300, 1e-10, 1.0, 1e300, 1.7e308]
    for low, high in itertools.combinations(sorted([*extremes, *(-x for x in extremes)]), 2):
        found = ticks(low, high)
        assert 0 < len(found) < 20
        assert all(map(math.isfinite, found))
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
