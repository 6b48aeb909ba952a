"""The lowest versions that pyproject.toml states, as constraints for pip.

    python .ci/lowest.py > lowest.txt
    PIP_CONSTRAINT=$PWD/lowest.txt make test

What has no lower bound (stubs, lint that only checks text) is left to pip. Torch is the Makefile's
to install; its version is `python .ci/lowest.py torch`.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path
from typing import Any

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
REQUIREMENT = re.compile(r"(?P<name>[\w.-]+)\s*(\[[^\]]*\])?\s*(?P<bounds>[^;@\[]*)(;.*)?")


def requirements(project: dict[str, Any]) -> list[str]:
    """What the package needs, and its extras."""
    extras = project.get("optional-dependencies", {})
    return [*project["dependencies"], *(line for lines in extras.values() for line in lines)]


def lowest(project: dict[str, Any]) -> dict[str, str]:
    """Name -> the lowest version that is stated for it.

    Raises:
        ValueError: a package has two, so that one of them is never tried.
    """
    found: dict[str, str] = {}
    for line in requirements(project):
        match = REQUIREMENT.fullmatch(line.strip())
        if match is None:
            raise ValueError(f"expected a name and bounds, got {line!r}")
        name = match["name"].lower()
        for bound in filter(None, (bound.strip() for bound in match["bounds"].split(","))):
            if bound.startswith(">="):
                version = bound.removeprefix(">=").strip()
                if found.setdefault(name, version) != version:
                    raise ValueError(f"{name} is stated with {found[name]} and with {version}")
    return found


def main(names: list[str]) -> None:
    """Print all constraints, or those of `names` as requirements."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    for name, version in sorted(lowest(project).items()):
        if not names or name in names:
            print(f"{name}=={version}")


if __name__ == "__main__":
    main(sys.argv[1:])
