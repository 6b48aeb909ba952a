"""What README, the pages and the recipes show: lines of a shell and blocks of Python, in order."""

from __future__ import annotations

import re
from collections.abc import Iterator

from processes import ROOT

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"),
                 *(ROOT / "examples").rglob("*.md"), *(ROOT / "examples").rglob("*.yaml")]
)  # fmt: skip

RUN = "house/test_commands_run"
EXECUTED = {
    "README.md": RUN,
    "docs/cards.md": RUN,
    "docs/export.md": RUN,
    "docs/install.md": RUN,
    "docs/peft.md": RUN,
    "docs/serve.md": RUN,
    "docs/trainers.md": RUN,
    "docs/tutorial.md": "house/test_tutorial",
    "examples/ddp.md": "house/test_examples",
    "examples/small_math.yaml": RUN,
}
"""By which test the lines of a page are executed that are not marked."""

PYTHON = {
    "README.md": "cli/test_readme",
    "docs/trainers.md": "training/test_as_documented",
}
"""By which other test the Python of such a page is."""

BY_CI = {
    "make demo": "package",
    "make test": "test-part",
    "make lint": "lint",
    ".venv/bin/python -m pytest -q tests/": "test-part",
}
"""Lines that a target of `make` executes, or what is in them; CI's script names it."""

NEEDS = {"a GPU", "a network", "Docker", "Ollama", "llama.cpp"}
"""What a line may be marked with, after `# needs `."""

OTHERS = ("curl", "docker", "lm_eval", "ollama", "pip", "vllm")
"""Programs of others that pages call."""

NAMES = re.compile(
    r"^(?:\.venv/bin/)?(leanlift|make|python3?|accelerate|torchrun|git|bash|srun|echo|"
    rf"lint-imports|pre-commit|pytest|ruff|mypy|{'|'.join(OTHERS)})(?=\s)"
)
CARD = re.compile(r"\A(?:#.*\n)*?#.*card\s+(?:#\s*)?with\s+(?:#\s*)?\d+\s+(?:#\s*)?GB")
"""The head of a recipe that is for a card."""


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """Code on a page, in order: fenced with its language, or indented, which has none."""
    pattern = r"^```(\w*)\n(.*?)^```|(?:\A|(?<=\n\n))((?: {4}[^\n]*\n)+)"
    for language, fenced, indented in re.findall(pattern, text, re.S | re.M):
        yield language, fenced or re.sub(r"^ {4}", "", indented, flags=re.M)


def steps_of(page: str) -> list[tuple[str, str]]:
    """The steps of a page: `sh` and a whole line of a shell, or `python` and a block; of a recipe
    the lines of its first comment, which are marked where it is one for a card."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if page.endswith(".yaml"):
        mark = "  # needs a GPU" if CARD.match(text) else ""
        lines = [line[1:].strip() for line in text.splitlines() if line.startswith("#     ")]
        return [("sh", line + mark) for line in lines]
    found = []
    for language, block in blocks(text):
        if language == "python":
            found.append(("python", block))
        elif language in ("", "bash", "sh"):
            whole = (line.strip() for line in block.replace("\\\n", " ").splitlines())
            found += [("sh", line) for line in whole if NAMES.match(line)]
    return found


def lines_of(page: str) -> list[str]:
    """The lines of a shell of a page."""
    return [text for kind, text in steps_of(page) if kind == "sh"]


def mark_of(line: str) -> str:
    """What a line says that it needs; empty where it can run anywhere."""
    return line.partition("# needs ")[2]
