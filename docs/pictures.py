"""Pictures of the screens in `tests/screens`, one SVG each in `docs/pictures`.

    python docs/pictures.py

The tests hold those texts against what the commands show, so a picture cannot show what is not so.
The colours are those of a terminal, given back by a few rules; fonts are the reader's own, nothing
is fetched.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
SCREENS, PICTURES = ROOT / "tests" / "screens", ROOT / "docs" / "pictures"

STYLES = {
    r"^(│ )?[a-z][a-z ]{1,10}(?=  )": "bold",
    r"[─│╭╮╰╯]": "dim",
    r"[█▏▎▍▌▋▊▉]{2,}[▏▎▍▌▋▊▉]?": "cyan",
    r"(?<=  )[▁▂▃▄▅▆▇█]+(?=  )": "magenta",
    r"⟦[^⟧]*⟧": "bold green",
    r"^✓": "green",
    r"^evaluation (after|before).*": "magenta",
    r"^step \d+: .*": "cyan",
    r"^(leanlift: |│ Ctrl-C: |Step \d+ is not).*": "yellow",
    r"leanlift (report|eval|export|train|plan|init|demo|info|chat)\b": "bold",
}

SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>
{lines}
</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">
{matrix}
</g>
</g>
</svg>
"""


def picture(name: str, text: str) -> str:
    """A screen of 80 columns as SVG."""
    console = Console(record=True, width=80, file=io.StringIO(), force_terminal=True)
    for line in text.strip("\n").splitlines():
        shown = Text(line)
        for pattern, style in STYLES.items():
            shown.highlight_regex(re.compile(pattern), style)
        console.print(shown, highlight=False)
    return console.export_svg(title=name, theme=MONOKAI, code_format=SVG, unique_id=name)


def main() -> None:
    """Draw all of them anew."""
    PICTURES.mkdir(exist_ok=True)
    for path in sorted(SCREENS.glob("*.txt")):
        drawn = picture(path.stem, path.read_text(encoding="utf-8"))
        (PICTURES / f"{path.stem}.svg").write_text(drawn, encoding="utf-8")


if __name__ == "__main__":
    main()
