"""What leanlift raises when the cause lies with the input.

`UserError` is a `ValueError` whose text is one complete sentence: what was expected, what came,
what to do. The command line prints it without a traceback and exits with code 2. Broken
invariants of leanlift itself are `assert`s instead.
"""

from __future__ import annotations

import errno

LONGEST = 600
"""Characters of another library's message that are passed on."""


def first_line(error: BaseException) -> str:
    """The first line of another library's error as a sentence, for use in a message of ours; and
    those that follow, as long as one ends in a colon: it announces them."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0] if lines else type(error).__name__
    if isinstance(error, KeyError):  # its text is the key as Python writes it
        key = str(error.args[0]) if error.args else said
        said = key if " " in key else f"there is no {key!r}"
    if said.endswith(":"):
        said = " ".join(lines).rstrip(":")
    if len(said) > LONGEST:
        said = said[:LONGEST].rstrip() + " …"
    return said.rstrip(".") + "."


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk or a quota is full: torch and
    safetensors write in their own code and raise their own kinds."""
    while error is not None:
        full = (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and error.errno in full:
            return True
        if any(words in str(error) for words in ("No space left on device", "os error 28")):
            return True
        error = error.__cause__ or error.__context__
    return False


class UserError(ValueError):
    """An input that cannot be used; the message says what to do about it."""


class MaskError(UserError):
    """What is to be trained is not in a model of these shapes: no weight is needed to see it."""


class OutOfMemoryError(UserError):
    """A run that did not fit its device; the last checkpoint is kept."""


class Interrupted(KeyboardInterrupt):
    """A run that was stopped by the user or by the machine; its text says what is kept.

    Attributes:
        exit_code: as a shell has it: 128 and the number of the signal.
    """

    def __init__(self, said: str, exit_code: int = 130) -> None:
        super().__init__(said)
        self.exit_code = exit_code
