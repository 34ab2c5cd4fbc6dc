"""Colours of the optimizers, readable on light and on dark paper."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from steepest.report.groups import Row
from steepest.training.registry import optimizers

__all__ = ["DARK", "LIGHT", "OTHERS", "Look", "Paper", "colour_of", "contrast", "looks", "looks_of", "readable"]

# Tones that stay apart from each other and from the registry's, for rows without a colour of their own.
OTHERS = ("#56B4E9", "#E69F00", "#882255", "#44AA99", "#999933", "#6A51C4", "#AA4466", "#117733", "#8C564B", "#6699CC")
DASHES = ((), (5.0, 2.0), (1.6, 1.6), (7.0, 2.0, 1.6, 2.0))


@dataclass(frozen=True)
class Paper:
    """Colours of a page.

    Attributes:
        paper: The background.
        raised: Background of what stands out a little.
        ink: Text.
        muted: Text of less weight.
        rule: Lines between things.
        accent: Marks of the best.
        line: Contrast that lines in an optimizer's colour have at least.
        text: Contrast that words in it have at least.
    """

    paper: str
    raised: str
    ink: str
    muted: str
    rule: str
    accent: str
    line: float
    text: float


LIGHT = Paper("#fcfcfa", "#f4f3ef", "#1c1d20", "#5c6067", "#e0ded8", "#8a5a00", line=3.2, text=4.8)
DARK = Paper("#15171b", "#1d2026", "#e9e7e3", "#a4a8af", "#343840", "#e3b341", line=4.6, text=6.0)


@dataclass(frozen=True)
class Look:
    """How a row is drawn: its colour before it is fitted to the paper, and its dashes."""

    colour: str
    dashes: tuple[float, ...] = ()


def colour_of(optimizer: str) -> str:
    """Colour of an optimizer, the same in every plot whatever else is compared.

    The entries take theirs from Okabe and Ito's palette, which readers with any colour vision can tell apart.

    Args:
        optimizer: Its name; one that is not registered gets a colour that depends on nothing but the name.

    Returns:
        A hexadecimal colour.
    """
    entry = optimizers().get(optimizer)
    if entry is not None:
        return entry.colour
    return OTHERS[hashlib.sha256(optimizer.encode()).digest()[0] % len(OTHERS)]


def looks(rows: Sequence[Row]) -> list[Look]:
    """Colour and dashes of every row.

    Args:
        rows: Rows of one plot.

    Returns:
        One look per row.
    """
    return looks_of([row.optimizer for row in rows])


def looks_of(names: Sequence[str]) -> list[Look]:
    """Colour and dashes of rows that are known by their optimizers.

    The first row of an optimizer has the optimizer's colour and a solid line. Its other rows take colours that
    are free, and dashes, so that they can be told apart without colours too.

    Args:
        names: The optimizer of every row.

    Returns:
        One look per row.
    """
    own = {name: colour_of(name) for name in names}
    free = [colour for colour in OTHERS if colour not in own.values()] or list(OTHERS)
    seen: dict[str, int] = {}
    found, taken = [], 0
    for name in names:
        again = seen.get(name, 0)
        seen[name] = again + 1
        found.append(Look(free[taken % len(free)] if again else own[name], DASHES[again % len(DASHES)]))
        taken += again > 0
    return found


def contrast(one: str, other: str) -> float:
    """Contrast of two colours as the web content accessibility guidelines define it.

    Args:
        one: A hexadecimal colour.
        other: Another one.

    Returns:
        1 to 21.

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


def readable(colour: str, background: str, ratio: float) -> str:
    """The nearest colour, darker or lighter, that has enough contrast.

    Args:
        colour: A hexadecimal colour.
        background: What it lies on.
        ratio: The contrast that is needed.

    Returns:
        A hexadecimal colour.
    """
    end = 0 if _luminance(background) > 0.5 else 255
    parts = _parts(colour)
    for step in range(51):
        mixed = [round(part + (end - part) * step / 50) for part in parts]
        found = f"#{mixed[0]:02x}{mixed[1]:02x}{mixed[2]:02x}"
        if contrast(found, background) >= ratio:
            break
    return found


def _parts(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [_linear(part / 255) for part in _parts(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _linear(part: float) -> float:
    return part / 12.92 if part <= 0.04045 else float(((part + 0.055) / 1.055) ** 2.4)
