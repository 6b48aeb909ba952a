"""Make the pictures of `docs/pictures`: every screen that a test holds, as it looks in a terminal.

    python docs/pictures.py [--page RUN]

The texts are those of `tests/screens/*.txt`, so a picture shows what the tests have seen. With
`--page` the page of a run is photographed too, light and dark, by a Chromium (on the path, or
$CHROMIUM). Pictures ask for no font and load nothing.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from rich.console import Console
from rich.style import Style
from rich.terminal_theme import TerminalTheme
from rich.text import Text

DOCS = Path(__file__).parent
TEXTS = DOCS.parent / "tests" / "screens"
PICTURES = DOCS / "pictures"
WIDTH = 80

THEME = TerminalTheme(
    (24, 26, 31),
    (222, 224, 228),
    [(24, 26, 31), (255, 138, 128), (111, 211, 155), (242, 166, 90), (126, 166, 255),
     (200, 160, 255), (120, 210, 220), (222, 224, 228)],
    [(96, 102, 114)] * 8,
)  # fmt: skip

FRAME = """<svg class="rich-terminal" viewBox="0 0 {width} {height}"
     xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g>
</svg>
"""

ACCENTS = (
    (r"[▏▎▍▌▋▊▉█▁▂▃▄▅▆▇]+", "blue"),
    (r"⟦[^⟧]*⟧", "bold green"),
    (r"✓|fits, \S+ GiB free", "green"),
    (r"✗|lacks \S+ GiB", "red"),
    (r"[─│╭╮╰╯]+", "bright_black"),
    (r"^evaluation (after|before).*", "magenta"),
    (r"^step \d+: .*", "cyan"),
    (r"^(leanlift: |│ Ctrl-C: |Step \d+ is not).*", "yellow"),
    (r"leanlift (report|eval|export|train|plan|init|demo|info|chat)\b.*", "magenta"),
    (r"^      --.*", "magenta"),
)
"""What a terminal may show in colour; the texts themselves have none."""


def picture(text: str, name: str) -> str:
    """A screen as SVG."""
    console = Console(record=True, width=WIDTH, file=io.StringIO(), highlight=False)
    shown = Text(text.rstrip("\n"), style=Style(color="white"))
    for pattern, colour in ACCENTS:
        shown.highlight_regex(re.compile(pattern, re.M), colour)
    console.print(shown)
    return console.export_svg(title="", theme=THEME, code_format=FRAME, unique_id=f"screen-{name}")


def draw_all(texts: Path, pictures: Path) -> list[str]:
    """Draw every screen, and the page that lists them; returns their names."""
    pictures.mkdir(exist_ok=True)
    names = sorted(path.stem for path in texts.glob("*.txt"))
    for name in names:
        text = (texts / f"{name}.txt").read_text(encoding="utf-8")
        (pictures / f"{name}.svg").write_text(picture(text, name), encoding="utf-8")
    shots = sorted(path.name for path in pictures.glob("*.png"))
    lines = ["# Screens", "", "Made by `python docs/pictures.py` from what the tests hold.", ""]
    for name in names:
        lines += [f"## {name.replace('-', ' ')}", "", f"![{name}]({name}.svg)", ""]
    for shot in shots:
        lines += [f"## {Path(shot).stem.replace('-', ' ')}", "", f"![{shot}]({shot})", ""]
    (pictures / "README.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return names


def photograph(run: Path, pictures: Path) -> None:
    """The page of a run, in both colours."""
    from leanlift.report.data import read_run
    from leanlift.report.page import write_page

    names = ("chromium", "chromium-browser", "google-chrome")
    browser = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if browser is None:
        raise SystemExit("there is no Chromium: put one on the path, or name it in $CHROMIUM.")
    pictures.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as work:
        page = write_page(read_run(run), Path(work) / "page.html")
        for name, scheme in (("report-page", 1), ("report-page-dark", 0)):
            subprocess.run(
                [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                 f"--user-data-dir={work}/{name}", "--window-size=1280,1500",
                 f"--blink-settings=preferredColorScheme={scheme}",
                 f"--screenshot={pictures / name}.png", page.as_uri()],
                check=True, capture_output=True,
            )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, metavar="RUN", help="also photograph its page")
    options = parser.parse_args()
    if options.page is not None:
        photograph(options.page, PICTURES)
    print(f"Drew {', '.join(draw_all(TEXTS, PICTURES))}")


if __name__ == "__main__":
    main()
