"""What leanlift raises when the cause lies with the input.

`UserError` is a `ValueError` whose text is one complete sentence: what was expected, what came,
what to do. The command line prints it without a traceback and exits with code 2. Broken
invariants of leanlift itself are `assert`s instead.
"""

from __future__ import annotations


class UserError(ValueError):
    """An input that cannot be used; the message says what to do about it."""
