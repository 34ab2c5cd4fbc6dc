"""Labels at the ends of lines, in places where they do not lie on each other."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steepest.report.curves import Band, Series
from steepest.report.goal import Target
from steepest.report.style import Paint

__all__ = ["fitting", "label_ends", "shortened", "spread_positions"]


@dataclass(frozen=True)
class _Label:
    text: str
    colour: str
    line: str
    weight: str = "bold"


def spread_positions(
    wanted: Sequence[float], *, gap: float, low: float = -math.inf, top: float = math.inf
) -> list[float]:
    """Move positions apart until neighbours are at least `gap` from each other.

    Labels that are too close form a group that is centred on the mean of what its members wanted, or stands at the
    bottom or hangs from the top where it would reach beyond them.

    Args:
        wanted: Where each label would like to be.
        gap: Smallest distance between two labels.
        low: Lowest position allowed, as long as there is room above it.
        top: Highest position allowed.

    Returns:
        Where each goes, in the order given.

    Example:
        >>> spread_positions([0.5, 0.5], gap=0.1)
        [0.45, 0.55]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[list[int]] = [[index] for index in order]

    def middle(group: list[int]) -> float:
        return sum(wanted[index] for index in group) / len(group)

    position = 0
    while position + 1 < len(groups):
        left, right = groups[position], groups[position + 1]
        room = gap * (len(left) + len(right)) / 2
        if middle(right) - middle(left) < room - 1e-12:
            groups[position : position + 2] = [left + right]
            position = max(0, position - 1)
        else:
            position += 1
    places = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = middle(group) + gap * (rank - (len(group) - 1) / 2)
    for index in sorted(order, key=lambda index: places[index]):
        places[index] = max(places[index], low)
        low = places[index] + gap
    for index in sorted(order, key=lambda index: -places[index]):
        places[index] = min(places[index], top)
        top = places[index] - gap
    return places


def shortened(text: str, length: int) -> str:
    """Cut a text that is too long.

    Args:
        text: The text.
        length: Most characters.

    Returns:
        The text, or its beginning and an ellipsis.

    Example:
        >>> shortened("steepest descent", 9)
        'steepest…'
    """
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def fitting(names: Sequence[str], length: int) -> list[str]:
    """Cut names that are too long, at their ends, or in their midst where they would look alike or lose digits.

    Args:
        names: The names.
        length: Most characters.

    Returns:
        A name for each; some are alike where nothing of this tells them apart.

    Example:
        >>> fitting(["sage 0.2 tail_cut=0.3", "sage 0.2 tail_cut=0.4", "sage 0.2"], 12)
        ['sage…ut=0.3', 'sage…ut=0.4', 'sage 0.2']
    """
    ends = [shortened(name, length) for name in names]
    # A number that is cut would pass for another one.
    alike = {cut for cut in ends if ends.count(cut) > 1 or re.search(r"[\d.]…$", cut)}
    # The end is what tells selections apart: it gets half of the room, and more where that is not enough.
    for tail in range(length // 2, length - 1):
        cut = [
            _without_midst(name, length, tail) if end in alike and len(name) > length else end
            for name, end in zip(names, ends, strict=True)
        ]
        if len(set(cut)) == len(set(names)):
            return cut
    return ends


def _without_midst(text: str, length: int, tail: int) -> str:
    return f"{text[: length - 1 - tail].rstrip(' ,(')}…{text[-tail:].lstrip()}"


def label_ends(
    figure: Any,
    axes: Any,
    series: Sequence[Series],
    paint: Paint,
    against: str,
    *,
    most: int,
    length: int,
    goal: Target | None = None,
) -> None:
    """Name each line at its right end, moved apart where ends are close, with a thin line to the end.

    Args:
        figure: Matplotlib figure.
        axes: Its axes, drawn and with their final limits.
        series: What was drawn.
        paint: In which colours.
        against: What the horizontal axis is.
        most: How many of the best are named.
        length: Most characters of a label.
        goal: What the line across the axes is named after.
    """
    ends = [
        (_Label(_named(item, cut, length), paint.text(item.look), paint.line(item.look)), *_end(item.band, against))
        for item, cut in zip(series, fitting([item.name for item in series], length), strict=True)
        if item.band is not None and item.rank < most and math.isfinite(item.band.middle[-1])
    ]
    low, high = axes.get_ylim()
    if goal is not None and low <= goal.value <= high:
        label = _Label(f"goal {goal.text}", paint.muted, paint.muted, "normal")
        ends.append((label, axes.get_xlim()[1], goal.value))
    figure.canvas.draw()
    box = axes.get_window_extent()
    wanted = [(axes.transData.transform((x, y))[1] - box.y0) / box.height for _, x, y in ends]
    gap = 1.35 * _text_size(axes) * figure.dpi / 72 / box.height
    for (label, x, y), place in zip(ends, spread_positions(wanted, gap=gap, low=0.0, top=1.0), strict=True):
        axes.annotate(
            label.text,
            xy=(x, y),
            xytext=(1.03, place),
            textcoords="axes fraction",
            color=label.colour,
            fontweight=label.weight,
            va="center",
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.line,
                "linewidth": 0.8,
                "alpha": 0.5,
                "shrinkA": 1,
                "shrinkB": 3,
            },
        )


def _named(item: Series, cut: str, length: int) -> str:
    return item.label if len(item.label) <= length else cut


def _end(band: Band, against: str) -> tuple[float, float]:
    return getattr(band, against)[-1], band.middle[-1]


def _text_size(axes: Any) -> float:
    """Size of the text on axes, in points."""
    return float(axes.xaxis.label.get_size())
