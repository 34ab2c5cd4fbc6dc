"""Reads a report the way a browser would, and is strict about it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "br", "img", "link", "input", "hr"}


@dataclass
class Element:
    """One element with what is in it."""

    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    def text(self) -> str:
        """All text in it."""
        return "".join(child if isinstance(child, str) else child.text() for child in self.children)

    def all(self, tag: str | None = None) -> list[Element]:
        """Elements in it, of a tag or of any."""
        found = [child for child in self.children if isinstance(child, Element)]
        deep = [inner for child in found for inner in [child, *child.all()]]
        return [element for element in deep if tag is None or element.tag == tag]

    def one(self, tag: str) -> Element:
        """The only element of a tag."""
        (found,) = self.all(tag)
        return found


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("root", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f"<{tag}> has an attribute twice: {names}"
        element = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes <{self.open[-1].tag}>"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def read_page(html: str) -> Element:
    """Parse a page; wrong nesting is an error."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    assert parser.open == [parser.root], f"never closed: {[element.tag for element in parser.open[1:]]}"
    return parser.root


def table_named(page: Element, name: str) -> list[list[str]]:
    """Texts of a table, row by row."""
    (box,) = [element for element in page.all("div") if element.attributes.get("aria-label") == name]
    return [[" ".join(cell.text().split()) for cell in row.all() if cell.tag in {"td", "th"}] for row in box.all("tr")]


def check_harmless(page: str, root: Element) -> None:
    """No script, nothing from outside, no reference that leads nowhere."""
    elements = root.all()
    identifiers = [element.attributes["id"] for element in elements if "id" in element.attributes]
    assert len(identifiers) == len(set(identifiers))
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "main",
        "header",
        "section",
        "footer",
        "h1",
        "h2",
        "h3",
    }
    allowed |= {
        "p",
        "span",
        "ul",
        "li",
        "dl",
        "dt",
        "dd",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "b",
        "small",
    }
    allowed |= {"a", "figure", "figcaption", "svg", "g", "path", "defs", "use", "text", "clippath", "rect", "line"}
    assert {element.tag for element in elements} <= allowed
    for element in elements:
        for name, value in element.attributes.items():
            assert not name.startswith("on"), name
            assert "://" not in value or name in {"aria-label", "data-label"}, value
            if name == "href":
                assert value.removeprefix("#") in identifiers
            for target in re.findall(r"url\(([^)]*)\)", value) if name in {"style", "clip-path", "fill"} else []:
                assert target.removeprefix("#") in identifiers
    css = root.one("style").text()
    assert "@import" not in css
    assert "url(" not in css
    assert "://" not in css
    assert "xmlns" not in page
