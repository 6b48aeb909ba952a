"""A page of HTML is whole and loads nothing."""

from __future__ import annotations

import re
from html.parser import HTMLParser


class Checker(HTMLParser):
    """Tags balance, nothing is loaded from anywhere, there is no script."""

    EMPTY = ("meta", "link", "br", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: dict[str, int] = {}
        self.metas: list[dict[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        named = dict(attrs)
        assert tag not in ("script", "iframe", "object", "embed", "img", "form"), tag
        assert not any(key.startswith("on") for key in named), named
        for key in ("href", "src", "data", "action", "xlink:href"):
            assert named.get(key) in (None, "data:,"), named
        if tag == "meta":
            self.metas.append(named)
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def check_page(html: str) -> Checker:
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert not checker.open
    assert not re.search(r"url\(|@import|https?://", html)
    return checker
