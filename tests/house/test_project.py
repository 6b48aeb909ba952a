"""What is said of the project in several places is said alike: versions, bounds, checks."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from types import ModuleType
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from processes import ROOT

import leanlift

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
UNBOUNDED = {"types-pyyaml"}
"""Stubs, which follow what they describe."""


def read_yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lowest", ROOT / ".ci" / "lowest.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_lowest_versions_are_those_that_are_stated(script: ModuleType) -> None:
    lowest = script.lowest(PROJECT)
    for line in script.requirements(PROJECT):
        need = Requirement(line)
        if need.name.lower() in UNBOUNDED:
            continue
        assert {clause.operator for clause in need.specifier} == {">=", "<"}, line
        assert need.specifier.contains(lowest[need.name.lower()]), line
    assert set(lowest) == {Requirement(line).name for line in script.requirements(PROJECT)} - {
        "types-PyYAML"
    }


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a>=1.2,<3"], {"a": "1.2"}),
        (["A-b <3, >= 1.2; python_version > '3'"], {"a-b": "1.2"}),
        (["a", "b<2"], {}),
        (["a[x,y]>=1,<2"], {"a": "1"}),
        (["a>=1,<2", "a>=1,<3"], {"a": "1"}),
        (["a>=1", "a>=2"], None),
        (["a @ https://x.y/z"], None),
    ],
    ids=str,
)
def test_bounds_are_read(
    script: ModuleType, lines: list[str], expected: dict[str, str] | None
) -> None:
    project = {"dependencies": lines[:1], "optional-dependencies": {"more": lines[1:]}}
    if expected is None:
        with pytest.raises(ValueError, match=r"expected a name and bounds|is stated with"):
            script.lowest(project)
    else:
        assert script.lowest(project) == expected


def test_the_workflow_runs_what_lands_a_change_on_every_python() -> None:
    jobs = read_yaml(".github/workflows/ci.yml")["jobs"]
    pythons = jobs["check"]["strategy"]["matrix"]["python"]
    stated = [line.rpartition(" ")[2] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert pythons == stated
    assert PROJECT["requires-python"] == f">={pythons[0]}"
    given = [step.get("with", {}).get("python-version") for step in jobs["lowest"]["steps"]]
    assert pythons[0] in given
    runs = {
        name: " ".join(step.get("run", "") for step in job["steps"]) for name, job in jobs.items()
    }
    assert "bash .ci/run" in runs["check"]
    assert ".ci/lowest.py > lowest.txt" in runs["lowest"]
    assert "make test " in runs["lowest"]


def test_a_commit_is_checked_by_what_make_check_runs() -> None:
    (local,) = read_yaml(".pre-commit-config.yaml")["repos"]
    assert local["repo"] == "local", "nothing is downloaded"
    hooks = {hook["entry"].removeprefix(".venv/bin/").split(" --")[0] for hook in local["hooks"]}
    assert hooks == {"ruff check", "ruff format", "mypy", "lint-imports"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [hook for hook in hooks if f"\t$(BIN)/{hook}" not in makefile] == []
    assert all(hook["language"] == "system" for hook in local["hooks"])


def test_a_citation_names_this_version_and_the_paper() -> None:
    citation = read_yaml("CITATION.cff")
    assert citation["version"] == leanlift.__version__
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["url"] == PROJECT["urls"]["Paper"]


def test_the_changelog_has_a_heading_per_release() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    releases = re.findall(r"^## (.*)$", text, re.M)
    assert releases[0] == "[Unreleased]"
    assert all(re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", name) for name in releases[1:])
    kinds = set(re.findall(r"^### (.*)$", text, re.M))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def links(name: str) -> list[str]:
    """The places in the repository that a page links to."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return [
        target.partition("#")[0]
        for target in re.findall(r"\]\(([^)\s]+)\)", text)
        if not target.startswith(("http", "#"))
    ]


PAGES = sorted(
    p.relative_to(ROOT).as_posix() for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
)


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    place = (ROOT / name).parent
    assert [target for target in links(name) if not (place / target).exists()] == []


def files_named(name: str) -> list[str]:
    """Python files of the package and the tests that a page names in code."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return re.findall(r"`((?:[\w]+/)+\w+\.py|tests/[\w/.]+)`", text)


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", *(p for p in PAGES if p.startswith("docs/"))])
def test_files_that_are_named_are_there(name: str) -> None:
    assert [
        file
        for file in files_named(name)
        if not any((place / file).exists() for place in (ROOT, ROOT / "leanlift"))
    ] == []
