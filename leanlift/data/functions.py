"""Functions of a user's, named by where they can be imported from: `my_rows:as_text`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leanlift.errors import UserError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterator


def function_named(name: str, setting: str) -> Callable[..., Any]:
    """Import a function; modules in the current directory are found, as `python -m` finds them.

    Args:
        name: as `module:function`, or `module.function`.
        setting: what names it, for messages.

    Raises:
        UserError: there is no such module or function, or the module cannot be imported.
    """
    module, _, function = name.rpartition(":" if ":" in name else ".")
    if not module or not function:
        raise UserError(
            f"{setting} {name!r} names no function: expected module:function, such as "
            "my_rows:as_text for the function as_text of my_rows.py."
        )
    with _current_directory_first():
        try:
            found: Any = importlib.import_module(module)
        except Exception as error:  # the module's own code may raise anything
            missing = isinstance(error, ModuleNotFoundError) and module.startswith(str(error.name))
            said = (
                f"there is no module {error.name} in {Path.cwd()} or among what is installed"
                if missing and isinstance(error, ModuleNotFoundError)
                else f"importing it fails with {type(error).__name__}: {first_line(error)}"
            )
            raise UserError(f"{setting} {name!r} cannot be used: {said.rstrip('.')}.") from error
    made = getattr(found, function, None)
    if not callable(made):
        what = "no function" if made is None else f"a {type(made).__name__}"
        raise UserError(f"{setting} {name!r} cannot be used: {module} has {what} {function}.")
    return made  # type: ignore[no-any-return]


@contextmanager
def _current_directory_first() -> Iterator[None]:
    place = str(Path.cwd())
    known = place in sys.path
    sys.path.insert(0, place)
    try:
        yield
    finally:
        sys.path.remove(place)
        if not known:
            sys.path.append(place)  # for what the function itself imports
