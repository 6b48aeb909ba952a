"""What is released: the package is checked, and the image is made of what is here."""

from __future__ import annotations

import fnmatch
import importlib.util
import io
import re
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from processes import ROOT

HOME = "leanlift-0.1.0.dist-info"
METADATA = (
    "Metadata-Version: 2.4\nName: leanlift\nVersion: 0.1.0\nSummary: s\nRequires-Python: >=3.11\n"
    "License-Expression: Apache-2.0\nAuthor: a\n"
)


@pytest.fixture(scope="module")
def package() -> ModuleType:
    spec = importlib.util.spec_from_file_location("package", ROOT / ".ci" / "package.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wheel_of(place: Path, package: ModuleType, without: str = "", more: str = "") -> Path:
    texts = dict.fromkeys(package.IN_THE_WHEEL, "")
    texts |= {f"{HOME}/entry_points.txt": "", f"{HOME}/licenses/LICENSE": ""}
    kept = [line for line in METADATA.splitlines() if not without or not line.startswith(without)]
    texts[f"{HOME}/METADATA"] = "\n".join(kept)
    if more:
        texts[more] = ""
    wheel = place / "a.whl"
    with zipfile.ZipFile(wheel, "w") as opened:
        for name, text in texts.items():
            if name != without:
                opened.writestr(name, text)
    return wheel


@pytest.mark.parametrize(
    ("without", "more", "said"),
    [
        ("leanlift/py.typed", "", "the wheel lacks leanlift/py.typed"),
        (f"{HOME}/licenses/LICENSE", "", f"the wheel lacks {HOME}/licenses/LICENSE"),
        ("", "tests/test_it.py", "the wheel has tests/test_it.py"),
        ("", "leanlift/__pycache__/it.pyc", "the wheel has leanlift/__pycache__/it.pyc"),
        ("Author", "", "the metadata have no Author"),
    ],
)
def test_what_is_wrong_with_a_wheel_is_said(
    without: str, more: str, said: str, package: ModuleType, tmp_path: Path
) -> None:
    assert package.problems_of_wheel(wheel_of(tmp_path, package, without, more)) == [said]


def test_an_sdist_has_all_that_git_tracks(package: ModuleType, tmp_path: Path) -> None:
    sdist = tmp_path / "a.tar.gz"
    with tarfile.open(sdist, "w:gz") as opened:
        opened.addfile(tarfile.TarInfo("leanlift-0.1.0/README.md"), io.BytesIO())
    assert package.problems_of_sdist(sdist, ["README.md"]) == []
    assert package.problems_of_sdist(sdist, ["README.md", ".ci/run"]) == ["the sdist lacks .ci/run"]


def test_what_a_wheel_has_to_have_is_here(package: ModuleType) -> None:
    assert [name for name in package.IN_THE_WHEEL if not (ROOT / name).is_file()] == []
    assert [name for name in package.TESTS if not (ROOT / name).is_file()] == []


def test_the_image_is_made_of_what_is_here() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (torch,) = re.findall(r"^TORCH \?= (\S+)$", makefile, re.M)
    assert f'ARG TORCH="{torch}"' in text
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", text)
    assert [name for name in extras.split(",") if f"\n{name} = [" not in project] == []
    pythons = re.findall(r"^FROM python:(\d+\.\d+)-slim", text, re.M)
    assert len(pythons) == 2
    assert all(f'"Programming Language :: Python :: {each}"' in project for each in pythons)
    assert text.index("USER leanlift") < text.index('ENTRYPOINT ["leanlift"]')
    ignored = [
        line
        for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
        if line and line[0] != "#"
    ]
    for needed in ("leanlift", "pyproject.toml", "README.md", "LICENSE"):
        assert not any(fnmatch.fnmatch(needed, pattern) for pattern in ignored), needed


def test_ci_builds_the_package_and_the_documents_name_it() -> None:
    assert "\nmake package" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "[docs/install.md]" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert "CHANGELOG.md" in (ROOT / "SECURITY.md").read_text(encoding="utf-8")
