"""Commands and Python that the pages show are ones that exist.

Every line of a shell that a page shows is one of three things: the step of a page that another test
executes (`EXECUTED`), a command whose options are parsed here by the command's own parser, so that
a renamed flag fails, or a call of another program, which stands in `OTHERS` with a reason. A line
that cannot run everywhere says so at its end: `# needs a GPU`.
"""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ROOT

from leanlift.cli import WITH_SETTINGS, build_parser
from leanlift.cli.options import options
from leanlift.cli.parsing import method_of, read_flags
from leanlift.errors import UserError

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"),
                 *(ROOT / "examples").rglob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
)  # fmt: skip
EXECUTED = {"docs/tutorial.md": "test_tutorial", "examples/ddp.md": "test_examples"}
"""Pages whose lines another test executes, but for those that are marked."""

NEEDS = {"a GPU", "a network", "Ollama", "llama.cpp"}
"""What a line may be marked with."""

OTHERS = {
    "curl": "executed by test_tutorial, where there is a server",
    "lm_eval": "EleutherAI's harness; tried by hand, as docs/peft.md says",
    "ollama": "another program",
    "pip": "installs from the network",
    "vllm": "needs a GPU",
}
NAMES = re.compile(
    r"^(?:\.venv/bin/)?(leanlift|make|python3?|accelerate|torchrun|git|bash|srun|echo|"
    rf"lint-imports|pre-commit|pytest|ruff|mypy|{'|'.join(OTHERS)})\b"
)
NOT_YET = {"serve", "doctor", "gguf"}
"""Commands, and a format, that pages name before they are there: looked at from the day that they
are."""


def code_blocks(text: str) -> Iterator[tuple[str, str]]:
    """Fenced blocks with their language, and indented ones, which have none."""
    yield from re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    bare = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    for block in re.findall(r"(?:\A|\n)\n((?: {4}.*\n)+)", bare):
        yield "", "".join(line[4:] for line in block.splitlines(keepends=True))


def lines_of(page: str) -> list[str]:
    """The shell lines of a page, each whole; of a recipe those of its first comment."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        return [line[1:].strip() for line in text.splitlines() if line.startswith("#     ")]
    found = []
    for language, block in code_blocks(text):
        if language in ("", "bash", "sh"):
            whole = block.replace("\\\n", " ").splitlines()
            found += [line.strip() for line in whole if NAMES.match(line.strip())]
    return found


def complaint(line: str) -> str | None:
    """What is wrong with a line; None: nothing that can be seen without running it."""
    _, _, mark = line.partition("# needs ")
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
    if any(word in NOT_YET and not is_there(word) for word in words):
        return None
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


def is_there(word: str) -> bool:
    """Whether a command is one, or a format one that `leanlift export` names."""
    commands = next(each for each in build_parser()._actions if each.dest == "command").choices
    assert commands is not None
    formats = " ".join(each.help or "" for each in commands["export"]._actions)
    return word in commands or word in formats


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


FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")


def test_options_in_sentences_are_ones_that_there_are() -> None:
    """Of `leanlift COMMAND … --option` in the middle of a text."""
    wrong = []
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        for span in re.findall(r"(?<!`)`leanlift ([a-z]+[^`]*)`", text):
            words = span.split()
            for flag in FLAG.findall(span):
                if words[0] in NOT_YET and not is_there(words[0]):
                    continue
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
    for language, block in code_blocks((ROOT / page).read_text(encoding="utf-8")):
        if language != "python":
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
    for page, test in EXECUTED.items():
        assert (ROOT / page).is_file()
        assert Path(ROOT / "tests" / "house" / f"{test}.py").is_file()
