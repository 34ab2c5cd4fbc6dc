"""Matplotlib figures as SVG that is part of a page: its text, its colours, nothing from outside."""

import io
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree as ET

from markupsafe import Markup

__all__ = ["inline_svg"]

_NAMESPACE = "{http://www.w3.org/2000/svg}"
_REFERENCE = re.compile(r"#([A-Za-z][\w.-]*)")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
# Matplotlib has written fonts in both ways.
_FONT = re.compile(r"font: (?:(\w+) )?([\d.]+)px [^;]*")
_FAMILY = re.compile(r"font-family: [^;]*(?:; *|$)")


def inline_svg(figure: Any, variables: Mapping[str, str], *, label: str, prefix: str) -> Markup:
    """Turn a figure into an SVG element for a page.

    Args:
        figure: Matplotlib figure.
        variables: CSS that stands for each stand-in colour.
        label: What the figure shows, for readers who do not see it.
        prefix: Put before every identifier: several figures share one page.

    Returns:
        The element; everything in it is escaped.
    """
    content = io.BytesIO()
    figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    root = ET.fromstring(content.getvalue().decode())
    _drop(root, {"metadata", "style"})
    used = {found for node in root.iter() for value in node.attrib.values() for found in _REFERENCE.findall(value)}
    for node in root.iter():
        node.tag = node.tag.removeprefix(_NAMESPACE)
        node.attrib = {
            _plain(name): _value(_plain(name), value, prefix, variables)
            for name, value in node.attrib.items()
            if name != "id" or value in used
        }
        if node.tag != "text":
            node.text = None
        node.tail = None
    root.attrib = {"viewBox": root.attrib["viewBox"], "role": "img", "aria-label": label}
    # The serialiser has escaped what needs it.
    return Markup(ET.tostring(root, encoding="unicode"))


def _drop(root: ET.Element, tags: set[str]) -> None:
    """Without a style element: on a page it would hold for everything there is."""
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.removeprefix(_NAMESPACE) in tags:
                parent.remove(child)


def _plain(name: str) -> str:
    return name.rsplit("}", maxsplit=1)[-1]


def _value(name: str, value: str, prefix: str, variables: Mapping[str, str]) -> str:
    if name == "id":
        return prefix + value
    if name in {"href", "clip-path"}:
        return _REFERENCE.sub(rf"#{prefix}\1", value)
    if name == "style":
        # The page's fonts, at the figure's size and weight.
        value = _FONT.sub(
            lambda found: f"font-size: {found[2]}px; font-weight: {found[1] or 400}", _FAMILY.sub("", value)
        )
        return _COLOUR.sub(lambda found: variables.get(found[0], found[0]), value)
    return value
