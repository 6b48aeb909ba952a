"""The tutorial as it is printed, on the model of the demo: the way that it has without a network.

Its commands run in this process, one after another in one directory, for a process each would take
longer to start than what it does. Replaced is the port alone. `test_commands` parses the steps that
are marked as needing something.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import ENVIRONMENT, ROOT, free_port

from leanlift.cli import main

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
SAVED = {
    text: name
    for name, text in re.findall(r"as `(\w+\.py)`:\n\n```python\n(.*?)^```", PAGE, re.S | re.M)
}
"""Blocks that the page has one save, and under which names."""


def steps() -> list[tuple[str, str]]:
    """The blocks of the page in their order, of a command a step of its own: language and text."""
    found = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```", PAGE, re.S | re.M):
        parts = text.replace("\\\n", " ").splitlines() if language == "bash" else [text]
        found += [(language, part) for part in parts if "# needs " not in part]
    return [step for step in found if not step[1].startswith("python3 -m venv")]


def is_later(step: str) -> bool:
    """Whether a step is one of the last two sections, which have tests of their own."""
    return "--format gguf" in step or step.startswith(("leanlift serve", "curl"))


def run(line: str) -> tuple[int, str]:
    """A `leanlift` command of the page, with what is piped into it: exit code, what it printed."""
    piped, _, command = line.rpartition(" | ")
    words = shlex.split(command)
    assert words[0] == "leanlift"
    said = f"{shlex.split(piped)[1]}\n" if piped else "next 48219 ->\n"
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.setattr("sys.stdin", io.StringIO(said))
        return main(words[1:]), out.getvalue()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """What each step of the page has printed but for the last two sections, in a directory of their
    own, which the tests are in."""
    place = tmp_path_factory.mktemp("tutorial")
    (place / "work").mkdir()
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place / "work")
        patch.setenv("LEANLIFT_PLANS", str(place / "plans"))  # plans are kept, as for anybody
        for language, step in steps():
            if step in SAVED:
                Path(SAVED[step]).write_text(step)
            elif language == "python" or step.startswith("python "):
                out = io.StringIO()
                with contextlib.redirect_stdout(out):
                    exec(step if language == "python" else Path(step.split()[1]).read_text(), {})
                found[step] = out.getvalue()
            elif not is_later(step):
                code, found[step] = run(step)
                assert code == 0, step
        yield found


def test_the_page_goes_all_the_way() -> None:
    lines = [step.rpartition(" | ")[2] for language, step in steps() if language == "bash"]
    words = [line.split()[:2] for line in lines]
    commands = [second for first, second in words if first == "leanlift"]
    assert commands == ["init", "plan", "train", "train", "report", "report", "eval", "chat",
                        "chat", "export", "export", "serve"]  # fmt: skip
    assert sorted(SAVED.values()) == ["rows.py", "small_model.py"]


@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:.*is deprecated")
def test_the_tutorial_ends_with_a_model_that_answers(printed: dict[str, str]) -> None:
    answers = [text.strip() for step, text in printed.items() if " chat " in step]
    assert answers == ["59320", "59320"]
    (piped,) = (text for step, text in printed.items() if "pipeline" in step)
    assert "59320" in piped
    assert Path("merged", "model.safetensors").is_file()
    assert Path("tutorial", "report.html").is_file()


@pytest.mark.thorough
@pytest.mark.usefixtures("printed")
def test_the_tutorial_writes_a_gguf_file(capfd: pytest.CaptureFixture[str]) -> None:
    (step,) = (step for _, step in steps() if "--format gguf" in step)
    code, _ = run(step)
    assert code == 0, capfd.readouterr().err
    assert list(Path("gguf").glob("*.gguf"))
    assert Path("gguf", "Modelfile").is_file()


@pytest.mark.thorough
@pytest.mark.usefixtures("printed")
def test_the_tutorial_serves_what_was_trained() -> None:
    serve, ask = (step for _, step in steps() if step.startswith(("leanlift serve", "curl")))
    port = str(free_port())
    words = shlex.split(serve.replace("8000", port))[1:]
    server = subprocess.Popen(
        [sys.executable, "-m", "leanlift", *words], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        for _ in range(600):
            asked = subprocess.run(["bash", "-c", ask.replace("8000", port)], capture_output=True,
                                   text=True, check=False)  # fmt: skip
            if asked.returncode == 0 or server.poll() is not None:
                break
            time.sleep(0.5)
        if server.poll() is not None:
            raise AssertionError(server.communicate()[0])
        assert json.loads(asked.stdout)["choices"][0]["message"]["content"].strip() == "59320"
    finally:
        server.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.communicate(timeout=30)
        server.kill()
