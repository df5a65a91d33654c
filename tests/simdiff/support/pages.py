"""What a page holds: its structure, text, references and pictures."""

from __future__ import annotations

import html.parser

VOID = {"meta", "link", "img", "br", "circle", "line", "rect", "path"}


class Structure(html.parser.HTMLParser):
    """Checks that elements are nested, and collects text, references and alternatives."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.urls: list[str] = []
        self.pictures: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.urls += [values[k] or "" for k in ("src", "href", "xlink:href") if k in values]
        if tag in ("svg", "img"):
            self.pictures.append((tag, values))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & {*self.open}:
            self.words.append(data)
        if self.open[-1:] == ["h2"]:
            self.headings.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


class References(html.parser.HTMLParser):
    """Collects what a page refers to and the text alternatives of its pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.alternatives: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.urls += [values[key] or "" for key in ("src", "href") if key in values]
        if tag == "img":
            self.alternatives.append(values.get("alt") or "")
        if tag == "svg":
            self.alternatives.append(values.get("aria-label") or "")
