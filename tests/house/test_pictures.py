"""Each screen that a test holds has its picture in the docs."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest
from processes import ROOT


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pictures", ROOT / "docs" / "pictures.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_screen_is_drawn_and_loads_nothing(pictures: ModuleType, tmp_path: Path) -> None:
    names = pictures.draw_all(pictures.TEXTS, tmp_path)
    assert {"report", "eval", "demo-end"} <= set(names)
    for name in names:
        svg = (tmp_path / f"{name}.svg").read_text(encoding="utf-8")
        assert "url(http" not in svg
        assert "@font-face" not in svg
        shown = "".join(ElementTree.fromstring(svg).itertext()).replace("\u00a0", " ")
        text = (pictures.TEXTS / f"{name}.txt").read_text(encoding="utf-8")
        plain = [line for line in text.splitlines() if line.isascii() and line.strip()]
        assert plain
        squeezed = "".join(shown.split())
        assert all("".join(line.split()) in squeezed for line in plain), name
        assert f"{name}.svg" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_the_docs_have_a_picture_of_every_screen(pictures: ModuleType) -> None:
    """Run docs/pictures.py where this fails."""
    drawn = {path.stem for path in pictures.PICTURES.glob("*.svg")}
    assert drawn == {path.stem for path in pictures.TEXTS.glob("*.txt")}
