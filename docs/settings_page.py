"""`docs/settings.md` from what declares the settings; a test holds the page to it.

python docs/settings_page.py
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from leanlift.cli.options import Option, _fields, run_options, sources
from leanlift.config import LiftConfig
from leanlift.defaults import command_defaults
from leanlift.methods import SFT
from leanlift.run_arguments import BaseAndRows, RunArguments

PAGE = Path(__file__).parent / "settings.md"
HEAD = """# Settings

Every key of leanlift's own in a file of settings, which is also a flag of `leanlift train` and
`leanlift plan` and, but for the last table, a field of `RunArguments`; the first table's are those
of `LiftConfig`. Defaults are the command's. Beside them every key of TRL's configuration and of
transformers' `TrainingArguments` works under its own name (`leanlift train --help_all`).
"""


def table(title: str, names: list[str], known: dict[str, Option]) -> str:
    """Some settings: name, what they may be, default, what they do."""
    defaults = {name: str(value) for name, value in command_defaults({}).items()}
    lines = [f"\n## {title}\n", "| key | may be | default | |", "|---|---|---|---|"]
    for name in names:
        option = known[name]
        default = defaults.get(name, option.default)
        written = f"`{default}`" if default else "–"
        cells = [f"`{name}`", option.kind.what, written, option.help]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    """The whole page."""
    own = _fields(*sources(SFT)[-1]) or {}
    run = run_options()
    lift = [each.name for each in fields(LiftConfig)]
    base = [each.name for each in fields(BaseAndRows)]
    others = [each.name for each in fields(RunArguments) if each.name not in {*lift, *base}]
    return HEAD + "".join(
        [
            table("What is trained", lift, run),
            table("Base and rows", base, run),
            table("The run", others, run),
            table("The training loop: leanlift's own, or with another default", list(own), own),
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
