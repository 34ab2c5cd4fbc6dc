"""The figures of the report, drawn with one set of colours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from markupsafe import Markup

from steepest.report.curves import Series, series_of
from steepest.report.groups import Cell
from steepest.report.labels import label_ends, shortened
from steepest.report.plot import MOST_COLOURED, Against, draw_losses
from steepest.report.style import PagePaint, page_style
from steepest.report.svg import inline_svg
from steepest.report.words import number

__all__ = ["LONGEST_LABEL", "Charts", "Figure", "room_for"]

_WIDTH, _HEIGHT = 4.6, 3.2
# Characters of a label beside a line; longer ones are cut there and whole in the legend.
LONGEST_LABEL = 14
# Inches: what the numbers on the left and a letter of a label at the right take at the page's font size.
_LEFT, _RIGHT, _LETTER = 0.5, 0.16, 0.088


@dataclass(frozen=True)
class Figure:
    """A figure of the page with the words above it."""

    caption: str
    svg: Markup


def room_for(labels: Sequence[str]) -> int:
    """Characters to leave room for beside the lines.

    Args:
        labels: What should stand there.

    Returns:
        The longest length, and at most that of the longest label allowed; 0 where no labels are of use: for one
        line alone, and where cut labels would be the same.
    """
    cut = {shortened(label, LONGEST_LABEL) for label in labels}
    return max(map(len, cut)) if len(labels) > 1 and len(cut) == len(labels) else 0


class Charts:
    """Draws the figures of one report; they share their colours and count their identifiers."""

    def __init__(self) -> None:
        self.paint = PagePaint()
        self._numbers = count(1)

    def losses(self, cell: Cell, goal: float | None) -> list[Figure]:
        """Validation loss against epochs and against seconds.

        Args:
            cell: Runs that may be compared.
            goal: Validation loss to reach.

        Returns:
            Two figures.
        """
        series = series_of(cell)
        named: dict[Against, str] = {"epochs": "epochs", "seconds": "seconds of training"}
        return [
            Figure(f"Validation {cell.problem.loss} against {words}", self._losses(series, against, goal, words))
            for against, words in named.items()
        ]

    def _losses(self, series: Sequence[Series], against: Against, goal: float | None, words: str) -> Markup:
        drawn = [item for item in series if item.band is not None and item.rank < MOST_COLOURED]
        length = room_for([item.name for item in drawn])
        room = max(length, len(f"goal {number(goal)}") if goal is not None else 0)

        def draw(figure: Any, axes: Any) -> None:
            draw_losses(axes, series, self.paint, against, goal=goal)
            named = series if length else []
            label_ends(figure, axes, named, self.paint, against, most=MOST_COLOURED, length=length, goal=goal)

        ends = [f"{item.label} {number(item.band.middle[-1])}" for item in series if item.band is not None]
        label = f"Validation loss against {words}. Medians at the end: {', '.join(ends) or 'no run finished'}."
        return self.figure(draw, label, room=room)

    def figure(self, draw: Callable[[Any, Any], None], label: str, *, room: int = 0) -> Markup:
        """Draw a figure of the page.

        Args:
            draw: Draws on a matplotlib figure and its axes.
            label: What the figure shows, for readers who do not see it.
            room: Characters to leave room for beside the lines.

        Returns:
            An SVG element.
        """
        with _axes(_RIGHT + _LETTER * room) as (figure, axes):
            draw(figure, axes)
            return inline_svg(figure, self.paint.variables(), label=label, prefix=f"f{next(self._numbers)}-")


@contextmanager
def _axes(right: float) -> Iterator[tuple[Any, Any]]:
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as MatplotlibFigure

    with mpl.rc_context(page_style()):
        figure = MatplotlibFigure(figsize=(_WIDTH, _HEIGHT))
        FigureCanvasAgg(figure)
        yield figure, figure.add_axes((_LEFT / _WIDTH, 0.145, (_WIDTH - _LEFT - right) / _WIDTH, 0.825))
