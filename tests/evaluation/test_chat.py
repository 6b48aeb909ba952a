"""A model that is talked to: what it is given, how it answers, in a terminal and from a pipe."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from terminal import Terminal
from tiny import make_checkpoint, make_tokenizer
from transformers import AutoModelForCausalLM

from leanlift import UserError
from leanlift.cli import main
from leanlift.data.tokens import Tokenization
from leanlift.evaluation.answers import Sample, greedy_answers
from leanlift.evaluation.chat import PROMPTS, Conversation, Sampling, answer
from leanlift.io.hub import has_file
from leanlift.rows.examples import ALPACA

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def conversation(template: str | None = TEMPLATE, **more: Any) -> Conversation:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return Conversation(Tokenization.of(tokenizer), **more)


def text_of(talk: Conversation, message: str) -> str:
    return str(talk.how.tokenizer.decode(talk.ask(message)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose answers can be long."""
    made = make_checkpoint(tmp_path_factory.mktemp("chat") / "base", dtype=torch.float16)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    return made


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()


def test_what_was_said_comes_before_what_is_said() -> None:
    talk = conversation(system="be brief")
    assert text_of(talk, "one") == "s:be brief\nu:one\na:"
    talk.keep("one", "two")
    assert text_of(talk, "three") == "s:be brief\nu:one\na:two\nu:three\na:"


def test_without_a_template_a_message_stands_alone() -> None:
    talk = conversation(None)
    talk.keep("one", "two")
    assert text_of(talk, "three") == "three"
    alpaca = conversation(None, prompt=PROMPTS["alpaca"])
    assert text_of(alpaca, "{x} 5") == ALPACA.format(instruction="{x} 5")


def test_a_template_that_refuses_a_turn_is_told() -> None:
    with pytest.raises(UserError, match="the conversation cannot be put into the chat template"):
        conversation("{{ raise_exception('no') }}").ask("hello")


def test_a_conversation_longer_than_the_positions_is_refused(model: Any) -> None:
    most = model.config.max_position_embeddings
    conversation().room(model, [5] * (most - 1))
    with pytest.raises(UserError, match=rf"has {most} tokens.*/clear begins"):
        conversation().room(model, [5] * most)


@pytest.mark.parametrize(
    ("own", "asked", "wanted"),
    [
        ({}, {}, (False, None, None)),
        ({"do_sample": True, "temperature": 0.7, "top_k": 20}, {}, (True, 0.7, 20)),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.0}, (False, None, None)),
        ({}, {"temperature": 0.5}, (True, 0.5, None)),
        ({"do_sample": True, "temperature": 0.7}, {"top_k": 3}, (True, 0.7, 3)),
        ({}, {"top_k": 3}, (True, None, 3)),
    ],
)
def test_what_is_not_asked_for_is_as_the_model_says(
    own: dict[str, Any], asked: dict[str, Any], wanted: tuple[Any, ...], model: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = type(model.generation_config)(**own)
    monkeypatch.setattr(model, "generation_config", config)
    found = Sampling(**asked, max_new_tokens=7).config(model, make_tokenizer())
    assert (found.do_sample, found.temperature, found.top_k) == wanted
    assert (found.max_new_tokens, found.max_length) == (7, None)
    assert config.to_dict() == type(config)(**own).to_dict(), "the model's own stays"


def test_an_answer_is_the_greedy_one_and_comes_in_pieces(model: Any) -> None:
    tokenizer, pieces = make_tokenizer(), []
    ids = tokenizer("add 1 and 22: ")["input_ids"]
    (wanted,) = greedy_answers(model, tokenizer, [Sample(ids, ids, ids, None)], 1, 24)
    found = answer(
        model, tokenizer, ids, Sampling(temperature=0.0, max_new_tokens=24), pieces.append
    )
    assert found == wanted == "".join(pieces) != ""


def test_an_answer_ends_before_an_end_token_that_is_no_special_one(model: Any) -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer("x")["input_ids"]
    first = answer(model, tokenizer, ids, Sampling(0.0, max_new_tokens=24))
    end = tokenizer(first[-1])["input_ids"][0]
    stopped = type(model.generation_config)(eos_token_id=end)
    own, model.generation_config = model.generation_config, stopped
    try:
        found = answer(model, tokenizer, ids, Sampling(0.0, max_new_tokens=24))
    finally:
        model.generation_config = own
    assert found == first[: first.index(first[-1])]


def test_an_interrupted_answer_is_what_there_was(model: Any) -> None:
    tokenizer, pieces = make_tokenizer(), []
    forward, calls = model.forward, []

    def interrupted(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return forward(*args, **more)

    model.forward = interrupted
    try:
        ids = tokenizer("five ")["input_ids"]
        found = answer(model, tokenizer, ids, Sampling(0.0), pieces.append)
    finally:
        del model.forward
    assert (len(tokenizer(found)["input_ids"]), found) == (5, "".join(pieces))


# --- the command --------------------------------------------------------------------------------


@pytest.fixture
def piped(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    def put(text: str) -> None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))

    yield put
    torch.manual_seed(0)


GREEDY = ["--temperature", "0", "--max_new_tokens", "12"]


def test_a_pipe_is_one_message_with_one_answer(
    base: Path, adapter: Path, piped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    said = []
    for more in ([str(base), "--load_in_4bit"], [str(adapter)], [str(adapter), "--base"]):
        piped("five\n")
        assert main(["chat", *more, *GREEDY]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[2] != said[1], "the base, and the adapter taken off"
    assert all(1 < len(each) <= 14 and each.endswith("\n") for each in said)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere/at/all"], "the base nowhere/at/all does not exist"),
        (["BASE", "--temperature", "-1"], "expected a temperature of at least 0, got -1."),
        (["BASE", "--temperature", "nan"], "expected a temperature of at least 0, got nan."),
        (["BASE", "--top_p", "1.5"], "expected a top_p from 0 to 1, got 1.5."),
        (["BASE", "--max_new_tokens", "0"], "expected a max_new_tokens of at least 1, got 0."),
        (["BASE", "--temperature", "inf"], "expected a temperature of at least 0, got inf."),
        (["BASE", "--seed", str(2**32)], f"expected a seed from 0 to {2**32 - 1}, got {2**32}."),
        (["BASE", "--prompt", "say"], "a text with {message}"),
        (["BASE", "--base"], "--base is about an adapter, and"),
        (["BASE", "--model_name_or_path", "x"], "--model_name_or_path is about an adapter, and"),
        (["BASE", "--system", "x"], "no place for --system"),
        (["EMPTY"], "is an empty directory: expected a run's output_dir"),
        (["BASE", "--load_in_4bit", "--load_in_8bit"], "exclude each other"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    argv: list[str], words: str, base: Path, tmp_path: Path, piped: Any,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("leanlift.cli.talk.load_model", None)
    piped("hello")
    places = {"BASE": str(base), "EMPTY": str(tmp_path)}
    assert main(["chat", *(places.get(word, word) for word in argv)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("is_adapter", [True, False])
def test_a_name_on_the_hub_is_an_adapter_or_a_model(
    is_adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str]] = []

    def has_file(name: str, file: str) -> bool:
        asked.append((name, file))
        return is_adapter

    seen: list[tuple[Any, Any]] = []
    monkeypatch.setattr("leanlift.io.hub.has_file", has_file)
    monkeypatch.setattr(
        "leanlift.cli.talk.chat_command",
        lambda options: seen.append((options.adapter, options.model_name_or_path)) or 0,
    )
    assert main(["chat", "some/name"]) == 0
    assert asked == [("some/name", "adapter_config.json")]
    assert seen == [("some/name", None) if is_adapter else (None, "some/name")]


def test_a_file_on_the_hub_is_there_if_it_is_cached_or_said_to_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def offline(*_: Any) -> bool:
        raise OSError("no network")

    monkeypatch.setattr("leanlift.io.hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("leanlift.io.hub.HfApi.file_exists", lambda *_: True)
    assert has_file("some/name", "adapter_config.json")
    monkeypatch.setattr("leanlift.io.hub.HfApi.file_exists", offline)
    assert not has_file("some/name", "adapter_config.json")
    monkeypatch.setattr("leanlift.io.hub.try_to_load_from_cache", lambda *_: "/cached")
    assert has_file("some/name", "adapter_config.json")


@pytest.mark.parametrize(
    ("text", "words"), [(" \n", "the input is empty"), ("a\udcff", "the input is no text in UTF-8")]
)
def test_a_pipe_without_a_message_is_refused(
    text: str, words: str, base: Path, piped: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    piped(text)
    assert main(["chat", str(base)]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What a model is given that is to answer, and does not."""
    found: list[tuple[Any, ...]] = []
    monkeypatch.setattr("leanlift.cli.talk.answer", lambda *each: found.append(each) or "")
    return found


def test_a_message_is_what_was_said_but_for_its_line_break(
    base: Path, piped: Any, given: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    piped(" next 12 -> \n")
    assert main(["chat", str(base)]) == 0
    talked(monkeypatch, ["chat", str(base)], ["next 12 -> "])
    said = [tokenizer.decode(prompt) for _, tokenizer, prompt, *_ in given]
    assert said == [" next 12 -> ", "next 12 -> "]


def test_an_answer_ends_where_the_positions_do(
    base: Path, piped: Any, given: list[tuple[Any, ...]]
) -> None:
    for most in (100_001, 12):
        piped("five")
        assert main(["chat", str(base), "--max_new_tokens", str(most)]) == 0
    assert [sampling.max_new_tokens for _, _, _, sampling, _ in given] == [100_000 - 4, 12]


def talked(monkeypatch: pytest.MonkeyPatch, argv: list[str], lines: list[Any]) -> None:
    """A talk at a terminal in which these lines are typed."""
    typed = iter(lines)

    def next_line(prompt: str = "") -> str:
        line = next(typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", next_line)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"isatty": lambda self: True})())
    assert main(argv) == 0


def test_a_talk_with_the_adapter_on_off_and_both(
    adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [
        "five", "/base", "five", "/base", "/compare", "five", KeyboardInterrupt(), "/compare",
        "five", "/what", "/base now", "/clear", "", "/quit", "five",
    ]  # fmt: skip
    talked(monkeypatch, ["chat", str(adapter), *GREEDY], lines)
    shown = capsys.readouterr().out
    assert "no chat template: each message stands alone, and goes to the model as it is" in shown
    with_it, after = shown.split("ends the talk.\n")[1].split("The base answers.\n")
    without, after = after.split("Base and adapter answer.\nBoth answer.\n")
    assert with_it != without
    assert after.startswith(f"base: {without}adapter: {with_it}")
    assert f"One answers.\n{with_it}There is no /what.\n/base" in after
    assert "/base takes nothing after it.\n" in after
    assert after.endswith("What was said is forgotten.\n"), "nothing comes after /quit"


def test_a_model_has_no_adapter_to_take_off(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    talked(monkeypatch, ["chat", str(base), *GREEDY], ["/base", "/compare", "/help"])
    shown = capsys.readouterr().out
    assert shown.count("There is no adapter to take off") == 2
    assert "/clear    forget what was said" in shown


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform == "win32", reason="has no pseudo-terminals")
def test_a_terminal_is_answered_interrupted_and_goes_on(adapter: Path) -> None:
    terminal = Terminal("chat", str(adapter), "--temperature", "0", "--max_new_tokens", "100000")
    terminal.read_until(rb"> ")
    terminal.type(b"hello\n")
    terminal.read_until(rb"hello\r\n\S{20}")
    terminal.type(b"\x03")
    terminal.read_until(rb"\r\n> $")
    terminal.type(b"/base\n")
    terminal.read_until(rb"The base answers\.\r\n> $")
    terminal.type(b"\x04")
    assert terminal.end() == 0
    assert b"Traceback" not in terminal.shown
