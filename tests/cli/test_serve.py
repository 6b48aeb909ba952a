"""`leanlift serve`: transformers' server, asked over HTTP as a client does; what is refused."""

from __future__ import annotations

import io
import json
import os
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from command import complaint
from processes import free_port
from tiny import load, make_checkpoint, make_tokenizer
from transformers.utils import logging as transformers_logging

from leanlift import LiftConfig, get_lift_model, save_adapter
from leanlift.cli import main
from leanlift.cli.serve import NEEDED, check_installed
from leanlift.errors import UserError
from leanlift.model import lift_layers

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
MESSAGES = [{"role": "user", "content": "five"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("serve") / "base", dtype=torch.float16)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = get_lift_model(load(base), LiftConfig(density=0.2, approx_rank=4), progress=False)
    torch.manual_seed(1)
    for layer in lift_layers(model).values():
        layer.values.data.normal_(std=0.2)
    directory = tmp_path_factory.mktemp("serve") / "my-run"
    save_adapter(model, directory)
    return directory


class Client:
    """Sends requests to a server of this machine."""

    def __init__(self, port: int) -> None:
        self.place = f"http://localhost:{port}"

    def wait(self) -> None:
        for _ in range(600):
            try:
                assert self.get("/health") == {"status": "ok"}
                return
            except OSError:
                time.sleep(0.1)
        raise AssertionError("no server has come")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.place + path, timeout=60) as answer:
            return json.load(answer)

    def post(self, path: str, **body: Any) -> str:
        request = urllib.request.Request(
            self.place + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return str(answer.read().decode())

    def chat(self, model: str, **more: Any) -> str:
        asked = {"model": model, "messages": MESSAGES, "temperature": 0, "max_tokens": 12, **more}
        return self.post("/v1/chat/completions", **asked)

    def said(self, model: str) -> str:
        """The answer of a chat."""
        return str(json.loads(self.chat(model))["choices"][0]["message"]["content"])


@pytest.fixture
def logs() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    yield
    transformers_logging.set_verbosity(before)


def served(argv: list[str], port: int, ask: Callable[[Client], Any]) -> Any:
    """What a client finds while the command serves; then Ctrl-C ends it, as success."""

    def asked() -> Any:
        try:
            client = Client(port)
            client.wait()
            return ask(client)
        finally:
            os.kill(os.getpid(), signal.SIGINT)

    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(asked)
        assert main(["serve", *argv, "--port", str(port)]) == 0
        return found.result()


def chatted(model: Path, monkeypatch: Any, capsys: Any, *more: str) -> str:
    """What `leanlift chat` answers."""
    monkeypatch.setattr(sys, "stdin", io.StringIO(MESSAGES[0]["content"]))
    capsys.readouterr()
    assert main(["chat", str(model), "--temperature", "0", "--max_new_tokens", "12", *more]) == 0
    return str(capsys.readouterr().out).removesuffix("\n")


@pytest.mark.usefixtures("logs")
def test_a_run_answers_what_chat_answers(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("uvicorn", reason="the extra leanlift[serving] is not installed")

    def ask(client: Client) -> dict[str, Any]:
        with pytest.raises(urllib.error.HTTPError, match="400"):
            client.chat("another")
        events = client.chat("my-run", stream=True).split("data: ")
        pieces = [json.loads(event)["choices"][0]["delta"].get("content") for event in events[1:]]
        with ThreadPoolExecutor(2) as pool:
            at_once = list(pool.map(client.said, ["my-run"] * 2))
        models = [model["id"] for model in client.get("/v1/models")["data"]]
        assert "this server has my-run alone" in client.post("/load_model", model="another")
        client.post("/reset")
        again = client.said("my-run")
        return {"pieces": pieces, "at once": at_once, "models": models, "again": again}

    found = served([str(run)], free_port(), ask)
    wanted = chatted(run, monkeypatch, capsys)
    assert wanted != chatted(run, monkeypatch, capsys, "--base"), "the adapter has a say"
    assert "".join(filter(None, found["pieces"])) == wanted
    assert found["at once"] == [wanted, wanted]
    assert found["again"] == wanted
    assert found["models"] == ["my-run"]


@pytest.mark.usefixtures("logs")
def test_a_model_is_served_by_its_name_and_the_missing_template_is_said(
    base: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("uvicorn", reason="the extra leanlift[serving] is not installed")
    plain = make_checkpoint(tmp_path / "plain", dtype=torch.float16)

    def ask(client: Client) -> Any:
        for streamed in (False, True):
            with pytest.raises(urllib.error.HTTPError, match="400") as refused:
                client.chat(str(plain), stream=streamed)
            said = json.load(refused.value)["detail"]
            assert said.startswith(f"{plain} has no chat template, so it takes no chats: send")
        asked = {"prompt": "five", "temperature": 0, "max_tokens": 3}
        text = client.post("/v1/completions", model=str(plain), **asked)
        return json.loads(text)["choices"][0]["text"]

    assert len(served([str(plain)], free_port(), ask)) == 3
    assert "/v1/chat/completions cannot" in capsys.readouterr().err


def test_what_is_missing_is_said_before_anything_is_loaded(
    base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"needs .*uvicorn.*pip install 'leanlift\[serving\]'"):
        monkeypatch.setattr("leanlift.cli.serve.find_spec", lambda name: None)
        check_installed()
    assert f"needs {', '.join(NEEDED)}, which" in complaint(capsys, "serve", str(base))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["BASE", "--port", "PORT"], "no server can listen at localhost:PORT"),
        (["BASE", "--port", "0"], "expected a port from 1 to 65535, got 0."),
        (["BASE", "--host", "no.such.host.invalid"], "is no address of this machine"),
        (["BASE", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
        (["BASE", "--model_name_or_path", "x"], "--model_name_or_path is about an adapter, and"),
        (["nowhere/at/all"], "the base nowhere/at/all does not exist"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    argv: list[str], words: str, base: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("leanlift.cli.serve.check_installed", lambda: None)
    with socket.create_server(("localhost", 0)) as taken:
        port = str(taken.getsockname()[1])
        said = complaint(capsys, "serve", *(
            {"BASE": str(base), "PORT": port}.get(word, word) for word in argv
        ))  # fmt: skip
    assert words.replace("PORT", port) in said
