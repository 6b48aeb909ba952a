"""The documentation as a site: built without a warning, whole, and asking no other server."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
from processes import ROOT, run_python

import leanlift

pytest.importorskip("mkdocs", reason="mkdocs is in the extras docs and dev")


ELSEWHERE = re.compile(r"""<(?:script|img|iframe|source)[^>]*\ssrc=["']?https?:[^>]*>|"""
                       r"""<link[^>]*stylesheet[^>]*href=["']?https?:[^>]*>""")  # fmt: skip
"""What a browser would fetch from another server by itself."""


def script(name: str) -> ModuleType:
    """A Python file of `docs/`."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    return script("site")


@pytest.mark.parametrize(
    ("source", "text", "there"),
    [
        ("docs/tour.md", "[a](../leanlift/tiles.py#x)", "[a](leanlift/tiles.py#x)"),
        ("docs/rows.md", "[a](plan.md) [b](#here)", "[a](plan.md) [b](#here)"),
        ("docs/index.md", "[a](../README.md#memory)", "[a](repository.md#memory)"),
        ("examples/ddp.md", "[a](../docs/trainers.md)", "[a](../trainers.md)"),
        ("README.md", "![a](docs/pictures/plan.svg)", "![a](pictures/plan.svg)"),
        ("benchmarks/quality/real/README.md", "[a](../samples)", "[a](../samples/README.md)"),
        ("docs/rows.md", "[a](../../secret.md) [b](none.md)", "[a](../../secret.md) [b](none.md)"),
        ("docs/rows.md", "[a](https://arxiv.org/x.md)", "[a](https://arxiv.org/x.md)"),
    ],
    ids=range(8),
)
def test_links_of_a_page_are_those_of_the_site(
    hooks: ModuleType, source: str, text: str, there: str
) -> None:
    assert hooks.rewritten(text, source) == there
    assert hooks.source_of(hooks.site_place(source)) == source


def test_the_api_page_has_every_public_name() -> None:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = {name.rpartition(".")[2] for name in re.findall(r"^::: (\S+)$", text, re.M)}
    assert set(leanlift.__all__) - {"__version__"} <= shown


def test_the_page_of_settings_is_what_declares_them() -> None:
    text = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert text == script("settings_page").page()
    assert "| `density` | a number in (0, 1] | `0.05` |" in text
    assert "| `optim` | " in text


@pytest.mark.thorough
def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    built = run_python("-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path),
                       NO_MKDOCS_2_WARNING="1")  # fmt: skip
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    api = (tmp_path / "api" / "index.html").read_text(encoding="utf-8")
    assert all(name in api for name in ("get_lift_model", "refresh_mask"))
    assert (tmp_path / "examples" / "ddp" / "index.html").is_file()
    assert (tmp_path / "leanlift" / "tiles.py").is_file()
    pages = [page.read_text(encoding="utf-8") for page in tmp_path.rglob("*.html")]
    assert len(pages) > 20
    assert [found for page in pages for found in ELSEWHERE.findall(page)] == []
