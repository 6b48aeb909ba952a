"""What the site has beside `docs/`: whatever of the repository its pages link to (mkdocs hooks).

The pages are written for whoever reads them in the repository, where `../examples/ddp.md` is a
file. On the site that file is a page of its own, and links lead to it. A page is where it is in the
repository, those of `docs/` at the root; the README, of whose name the front page is, is
`repository.md`. Pages that are brought so are looked through for links as well.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[)#])")
"""A place, relative to the page, that a page links to; without the part of it that is meant."""


def site_place(source: str) -> str:
    """Where a file of the repository is on the site; both as POSIX paths from their roots."""
    if source == "README.md":
        return "repository.md"
    return source.removeprefix(f"{DOCS}/")


def source_of(place: str) -> str:
    """The file of the repository that is at a place of the site."""
    if place == "repository.md":
        return "README.md"
    own = f"{DOCS}/{place}"
    return own if (ROOT / own).is_file() else place


def target_of(source: str, link: str) -> str | None:
    """The file of the repository that a link of one of its pages leads to, of a directory the
    README in it; None: to none."""
    found = Path(os.path.normpath(PurePosixPath(source).parent / link))
    if (ROOT / found).is_dir():
        found /= "README.md"
    inside = ".." not in found.parts and (ROOT / found).is_file()
    return found.as_posix() if inside else None


def rewritten(text: str, source: str, each: Callable[[str], Any] = lambda target: None) -> str:
    """A page's text with its links as they are on the site.

    Args:
        text: of the page.
        source: where it is in the repository.
        each: is told of every file that it links to.
    """
    start = str(PurePosixPath(site_place(source)).parent)

    def link(found: re.Match[str]) -> str:
        target = target_of(source, found[0])
        if target is None:  # mkdocs says so
            return found[0]
        each(target)
        return PurePosixPath(os.path.relpath(site_place(target), start)).as_posix()

    return LINK.sub(link, text)


def on_files(files: Any, config: Any, **more: Any) -> Any:
    """Bring the files that pages link to, and those that these link to."""
    waiting = [source_of(file.src_uri) for file in files.documentation_pages()]
    waiting += [f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG")]
    known: set[str] = set()
    while waiting:
        source = waiting.pop()
        if source in known:
            continue
        known.add(source)
        place, path = site_place(source), ROOT / source
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, abs_src_path=str(path)))
        if path.suffix == ".md":
            rewritten(path.read_text(encoding="utf-8"), source, waiting.append)
    return files


def on_page_markdown(markdown: str, page: Any, **more: Any) -> str:
    """Links as they are on the site."""
    return rewritten(markdown, source_of(page.file.src_uri))
