"""Commands and Python that the pages show are ones that exist.

Every line of a shell that a page shows is executed: by the test that `EXECUTED` names for its
page, or by CI itself (`BY_CI`). One that cannot be, says at its end what it needs: `# needs a GPU`.
All are parsed here besides, by the command's own parser, so that a renamed flag fails at once, also
in a line that is marked, and so are commands in the middle of a sentence.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex

import pytest
from commands_of_pages import (
    BY_CI,
    EXECUTED,
    NEEDS,
    OTHERS,
    PAGES,
    PYTHON,
    lines_of,
    mark_of,
    steps_of,
)
from processes import ROOT

from leanlift.cli import WITH_SETTINGS, build_parser
from leanlift.cli.options import options
from leanlift.cli.parsing import method_of, read_flags
from leanlift.errors import UserError


def complaint(line: str) -> str | None:
    """What is wrong with a line; None: nothing that can be seen without running it."""
    mark = mark_of(line)
    if mark and not any(mark.startswith(each) for each in NEEDS):
        return f"is marked with {mark!r}: expected one of {', '.join(sorted(NEEDS))}"
    if "-m leanlift " in line:
        line = "leanlift " + line.partition("-m leanlift ")[2].rstrip("'\"")
    line = line.rpartition(" | ")[2]
    words = shlex.split(line, comments=True)
    words = [word for word in words if not word.startswith("$RESUME")]
    program = words[0].removeprefix(".venv/bin/")
    if program == "leanlift":
        return parsed(words[1:])
    if program == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        gone = [name for name in targets if not re.search(rf"^{name}:", makefile, re.M)]
        return f"names no target {gone[0]}" if gone else None
    if program.startswith("python"):
        return started(words[1:])
    return None


def parsed(words: list[str]) -> str | None:
    """What the parser of a `leanlift` command says against its options."""
    try:
        if words[0] in WITH_SETTINGS:
            table = options(method_of(words[1:]))
            assert table is not None
            read_flags(words[0], words[1:], table)
        else:
            _, left = build_parser().parse_known_args(words)
            if left:
                return f"has no option {left[0]}"
    except (UserError, SystemExit) as error:
        return str(error)
    return None


def started(words: list[str]) -> str | None:
    """Whether what `python` is to start is here."""
    if words[:1] == ["-c"]:
        compile(words[1], "a line", "exec")
    elif words[:1] == ["-m"]:
        name = words[1].replace(".", "/")
        ours = any((ROOT / f"{name}{end}").exists() for end in (".py", "/__main__.py"))
        if words[1].startswith("benchmarks") and not ours:
            return f"starts no module {words[1]}"
    elif words and words[0].endswith(".py") and "/" in words[0] and not (ROOT / words[0]).exists():
        return f"starts no file {words[0]}"
    return None


@pytest.mark.parametrize("page", PAGES)
def test_each_command_is_one_that_there_is(page: str) -> None:
    assert [f"{line}: {said}" for line in lines_of(page) if (said := complaint(line))] == []


def test_most_pages_have_commands() -> None:
    counted = {page: len(lines_of(page)) for page in PAGES}
    assert counted["README.md"] > 15
    assert counted["docs/tutorial.md"] > 12
    assert counted["examples/dpo.yaml"] == 2
    assert all(counted[page] for page in EXECUTED)


def test_each_command_is_executed_or_says_what_it_needs() -> None:
    left = {}
    for page in PAGES:
        unmarked = [line for line in lines_of(page) if not mark_of(line)]
        left[page] = [line for line in unmarked if not line.startswith(tuple(BY_CI))]
    assert [page for page, lines in left.items() if lines and page not in EXECUTED] == []
    others = re.compile("|".join(name for name in OTHERS if name != "curl"))
    assert [line for lines in left.values() for line in lines if others.match(line)] == []
    shown = {page for page in PAGES if any(kind == "python" for kind, _ in steps_of(page))}
    assert shown <= {*EXECUTED, *PYTHON}


def test_ci_executes_what_it_is_said_to() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    made = {
        word for line in script.splitlines() if line.startswith("make ") for word in line.split()
    }
    assert set(BY_CI.values()) <= made


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_options_in_sentences_are_ones_that_there_are() -> None:
    """Of `leanlift COMMAND … --option` in the middle of a text."""
    wrong = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for span in re.findall(r"(?<!`)`leanlift ([a-z]+[^`]*)`", text):
            words = span.split()
            for flag in FLAG.findall(span):
                if flag not in flags_of(words[0]):
                    wrong.append(f"{page}: leanlift {' '.join(words)}")
    assert wrong == []


def flags_of(command: str) -> set[str]:
    """Every option of a command."""
    if command in WITH_SETTINGS:
        table = options("sft")
        assert table is not None
        own = {"config", "fit", "dry_run", "save", "plot", "json", "cpu", "card", "table", "help",
               "help_all", "method"}  # fmt: skip
        return {f"--{name}" for name in {*own, *table}}
    commands = next(a for a in build_parser()._actions if a.dest == "command").choices
    assert commands is not None
    return {name for action in commands[command]._actions for name in action.option_strings}


@pytest.mark.parametrize("page", [page for page in PAGES if page.endswith(".md")])
def test_python_on_a_page_compiles_and_imports_what_there_is(page: str) -> None:
    for kind, block in steps_of(page):
        if kind != "python":
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [a.name for a in node.names if not hasattr(module, a.name)] == []
            elif isinstance(node, ast.Import):
                assert [importlib.import_module(alias.name) for alias in node.names]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("leanlift plan --fit 8GB --table", None),
        ("leanlift plan --fits 8GB", "did you mean --fit"),
        ("leanlift eval --data a.jsonl --adapters RUN", "--adapters"),
        ("echo hi | leanlift chat RUN --sistem x", "--sistem"),
        ("torchrun --standalone -m leanlift train --learning_rates 1", "did you mean"),
        ("make demos", "no target demos"),
        ("python -m benchmarks.plans", "no module"),
        ("python examples/none.py", "no file"),
        ("leanlift train --config run.yaml   # needs luck", "is marked with 'luck'"),
    ],
)
def test_a_command_that_is_not_there_is_seen(line: str, said: str | None) -> None:
    found = complaint(line)
    assert (found is None) if said is None else (found is not None and said in found)


def test_who_executes_a_page_is_there() -> None:
    for page, test in {**EXECUTED, **PYTHON}.items():
        assert (ROOT / page).is_file()
        assert (ROOT / "tests" / f"{test}.py").is_file()
