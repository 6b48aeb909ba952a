"""What is passed on of other libraries' messages."""

from __future__ import annotations

import logging
from io import StringIO

import pytest

from leanlift.cli import main
from leanlift.errors import LONGEST, first_line

MESSAGES = {
    "one line": "one line.",
    "ends.": "ends.",
    "first\nsecond": "first.",
    "\n\n  first  \nsecond": "first.",
    "could not make one from one of:\n(1) a file,\n(2) a package that is missing.": (
        "could not make one from one of: (1) a file, (2) a package that is missing."
    ),
    "announces:\n": "announces.",
    "announces:\n\n\n": "announces.",
    "a: b\nc": "a: b.",
    "": "ValueError.",
}


@pytest.mark.parametrize("message", MESSAGES, ids=range(len(MESSAGES)))
def test_a_line_that_announces_others_brings_them(message: str) -> None:
    assert first_line(ValueError(message)) == MESSAGES[message]


def test_no_message_is_without_end() -> None:
    said = first_line(ValueError("these:\n" + "\n".join(f"key.{i}" for i in range(10_000))))
    assert said.startswith("these: key.0 key.1")
    assert len(said) <= LONGEST + 3
    assert "\n" not in said


def test_the_hub_is_heard_once(capsys: pytest.CaptureFixture[str]) -> None:
    """By the handler that its library has, and not by the root's, which is ours."""
    root, heard = logging.getLogger(), StringIO()
    handler = logging.StreamHandler(heard)
    root.addHandler(handler)
    try:
        assert main(["report", "nowhere"]) == 2
        logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
        logging.getLogger("other").warning("is heard")
    finally:
        root.removeHandler(handler)
    assert heard.getvalue() == "is heard\n"
    capsys.readouterr()
