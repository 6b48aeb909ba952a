"""Commands of README and the pages, executed as they are written, on the model of the demo.

A page's lines, and its Python where no other test has it, run in this process in their order, in a
directory in which what they name is there: under the names of models the demo's model with a chat
template, under `RUN` a run, and files of rows. Lines that are marked as needing something are left
out. Nothing is replaced but the port of a server, and what is added is in `MORE`.
"""

from __future__ import annotations

import io
import json
import shlex
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from commands_of_pages import BY_CI, EXECUTED, PYTHON, RUN, mark_of, steps_of
from processes import ROOT, free_port, run_python
from transformers.utils import logging as transformers_logging

from leanlift.cli import main

TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'user' %} {% else %}{{ eos_token }}{% endif %}{% endfor %}"
)
MODELS = ("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B-Instruct", "BASE")
RUNS = ("RUN", "RUN1", "RUN2", "runs/my-run")
MORE = {"train": "--max_steps 1", "chat": "--max_new_tokens 8", "python": "--steps 1"}
"""What a line gets at its end, by its command: small sizes."""

MADE = {
    "README.md": {
        "run.yaml", "runs/qwen2.5-7b-rows/report.html", "merged-fp16/model.safetensors",
        "merged/model.safetensors", "peft/adapter_config.json", "st/adapter_config.json",
        "both/adapter_config.json",
    },
    "docs/cards.md": set(),
    "docs/export.md": {"nf4/model.safetensors", "w4a16/model.safetensors"},
    "docs/install.md": set(),
    "docs/peft.md": {
        "peft/adapter_model.safetensors", "merged/model.safetensors", "base-nf4/config.json",
    },
    "docs/serve.md": set(),
    "docs/trainers.md": {"run/adapter_model.safetensors"},
    "examples/small_math.yaml": {"small-base/config.json", "runs/small-math-merged/config.json"},
}  # fmt: skip
"""Files that the lines of a page leave, some of them."""

LOOK = 'import urllib.request\nurllib.request.urlopen("http://localhost:8000/v1/models").read()'
"""A client, where a page has none."""

Rows = list[dict[str, Any]]


def chats(count: int) -> Rows:
    return [
        {"messages": [{"role": "user", "content": f"next {n} ->"},
                      {"role": "assistant", "content": str(n + 1)}]}
        for n in range(count)
    ]  # fmt: skip


FILES = {
    "rows.jsonl": chats(16),
    "test.jsonl": chats(2),
    "pairs.jsonl": [{"prompt": f"next {n} ->", "chosen": "1", "rejected": "2"} for n in range(8)],
    "rows.json": [{"instruction": f"What is {n}?", "output": f"It is {n}."} for n in range(64)],
}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model, a run of it, and the rows."""
    place = tmp_path_factory.mktemp("shared")
    model = shutil.copytree(ROOT / "leanlift" / "demo" / "base", place / "model")
    (model / "chat_template.jinja").write_text(TEMPLATE)
    for name, rows in FILES.items():
        lines = [json.dumps(row) for row in rows]
        text = f"[{','.join(lines)}]" if name.endswith(".json") else "\n".join(lines)
        (place / name).write_text(text)
    (place / "prose.txt").write_text("next to it is a copy of it.\n" * 4)
    argv = ["train", "--model_name_or_path", str(model), "--output_dir", str(place / "my-run"),
            "--dataset_name", str(place / "rows.jsonl"), "--max_steps", "1"]  # fmt: skip
    assert main(argv) == 0
    return place


@pytest.fixture
def names(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with what pages name."""
    targets = {"examples": ROOT / "examples", "prose.txt": shared / "prose.txt"}
    targets |= {name: shared / name for name in FILES}
    targets |= dict.fromkeys(MODELS, shared / "model")
    targets |= dict.fromkeys(RUNS, shared / "my-run")
    for name, target in targets.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_here(page: str) -> list[tuple[str, str]]:
    """What is executed of a page, here."""
    return [
        (kind, text)
        for kind, text in steps_of(page)
        if (page not in PYTHON if kind == "python" else not mark_of(text))
        and not text.startswith(tuple(BY_CI))
    ]


def execute(line: str, client: str) -> int:
    """A line of a shell; returns its exit code.

    Args:
        line: `leanlift …`, or `python FILE …`.
        client: Python that asks a server, where the line starts one.
    """
    program, *words = shlex.split(line, comments=True)
    command = words[0] if program == "leanlift" else program
    words += MORE.get(command, "").split()
    if program == "python":
        return run_python(*words, cwd=Path.cwd()).returncode
    assert program == "leanlift"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("next 48219 ->\n"))
        if command != "serve":
            return main(words)
        port, verbosity = str(free_port()), transformers_logging.get_verbosity()
        answered: list[str] = []
        patch.setattr("uvicorn.Server.run", asked(client.replace("8000", port), answered))
        code = main([*words, "--port", port])
        transformers_logging.set_verbosity(verbosity)
        return code if answered else 1


def asked(client: str, answered: list[str]) -> Callable[[Any], None]:
    """Of uvicorn's server: serve for as long as a client takes, which is noted at its end."""
    from uvicorn import Server

    run = Server.run

    def ask(server: Any) -> None:
        while not server.started and not server.should_exit:
            time.sleep(0.05)
        names: dict[str, Any] = {}
        try:
            exec(client, names)
            answered.append(client)
        finally:
            if "client" in names:
                names["client"].close()
            server.should_exit = True

    def serve(server: Any) -> None:
        with ThreadPoolExecutor(1) as pool:
            client_ends = pool.submit(ask, server)
            try:
                run(server)
            finally:
                server.should_exit = True
            client_ends.result()

    return serve


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is deprecated")
@pytest.mark.parametrize("page", [page for page, test in EXECUTED.items() if test == RUN])
def test_the_commands_of_a_page_run(
    page: str, names: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = steps_here(page)
    serves = any("leanlift serve" in text for _, text in steps)
    python = [text for kind, text in steps if kind == "python"]
    if serves:
        pytest.importorskip("uvicorn", reason="the extra leanlift[serving] is not installed")
    if page == "docs/serve.md":  # what it serves is there, and its Python is the client's
        (names / "merged").symlink_to(names / "BASE")
    for kind, text in steps:
        if kind == "sh":
            client = python[0] if serves and "my-run" in text else LOOK
            assert execute(text, client) == 0, f"{text}\n{capsys.readouterr().err}"
        elif not serves:
            exec(text, {})
    assert [name for name in MADE[page] if not (names / name).exists()] == []


def test_what_is_executed_is_most_of_it() -> None:
    counted = {page: len(steps_here(page)) for page in MADE}
    assert counted == {
        "README.md": 13, "docs/cards.md": 0, "docs/export.md": 2, "docs/install.md": 1,
        "docs/peft.md": 3, "docs/serve.md": 3, "docs/trainers.md": 1, "examples/small_math.yaml": 2,
    }  # fmt: skip
    assert MADE.keys() == {page for page, test in EXECUTED.items() if test == RUN}
