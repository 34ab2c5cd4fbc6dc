"""What the pages share: the templates of this package, with their macros, and the style sheet in its colours."""

import re
from dataclasses import fields
from functools import cache
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined, Template
from markupsafe import Markup, escape

from steepest.report.palette import DARK, LIGHT, Paper
from steepest.report.style import PagePaint

__all__ = ["page_sheet", "page_template"]

_UNBROKEN = re.compile(r"[\d.,]+(?:e-?\d+)? (?:s\b|%)|[\d.]+e-?\d+|--[\w-]+")


def page_template(name: str) -> Template:
    """Read a template of this package, which may import from others.

    Args:
        name: Its file.

    Returns:
        The template.
    """
    return _environment().get_template(name)


def page_sheet(paint: PagePaint, *others: str) -> Markup:
    """The style sheet: the report's, with the colours of a page, light and dark.

    Args:
        paint: Colours that were drawn with.
        *others: More sheets of this package, by file.

    Returns:
        CSS.
    """
    light, dark = (_declarations(paper, paint) for paper in (LIGHT, DARK))
    colours = f":root {{ {light} }}\n@media screen and (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"
    # Colours and files of this package: nothing of a user's, nothing to escape.
    return Markup("\n".join([colours, *map(_text, ("report.css", *others))]))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FunctionLoader(_text), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["unbroken"] = _unbroken
    return environment


def _text(name: str) -> str:
    return files("steepest.report").joinpath(name).read_text(encoding="utf-8")


def _declarations(paper: Paper, paint: PagePaint) -> str:
    own = {f"--{item.name}": getattr(paper, item.name) for item in fields(paper) if item.type is str}
    return " ".join(f"{name}: {value};" for name, value in {**own, **paint.values(paper)}.items())


def _unbroken(text: str) -> Markup:
    """Escaped text in which numbers with a unit or an exponent, and options, stay on one line."""
    return Markup(_UNBROKEN.sub(r'<span class="unbroken">\g<0></span>', str(escape(text))))
