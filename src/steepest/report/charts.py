"""The figures of the report, drawn with one set of colours."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

from markupsafe import Markup

from steepest.report.curves import Series, series_of
from steepest.report.goal import Goal
from steepest.report.groups import Cell
from steepest.report.labels import fitting, label_ends
from steepest.report.measure import LOSS, Measure
from steepest.report.names import short_names
from steepest.report.plot import MOST_COLOURED, Against, draw_curves
from steepest.report.style import PagePaint, page_style
from steepest.report.svg import inline_svg

__all__ = ["LONGEST_LABEL", "Charts", "Figure", "room_for"]

_WIDTH, _HEIGHT = 4.6, 3.2
# Characters of a label beside a line; longer ones are cut there and whole in the legend.
LONGEST_LABEL = 16
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
    cut = fitting(labels, LONGEST_LABEL)
    return max(map(len, cut)) if len(labels) > 1 and len(set(cut)) == len(labels) else 0


class Charts:
    """Draws the figures of one report; they share their colours and count their identifiers."""

    def __init__(self) -> None:
        self.paint = PagePaint()
        self._numbers = count(1)

    def curves(self, cell: Cell, goal: Goal | None) -> list[Figure]:
        """Validation loss, and the metric that the goal is a value of, against epochs and against seconds.

        Args:
            cell: Runs that may be compared.
            goal: What is to be reached.

        Returns:
            Two figures of the loss, and two of the metric if the goal is by one.
        """
        measures = [LOSS] if goal is None or goal.measure == LOSS else [LOSS, goal.measure]
        return [figure for measure in measures for figure in self._both(cell, measure, goal)]

    def _both(self, cell: Cell, measure: Measure, goal: Goal | None) -> list[Figure]:
        series, names = series_of(cell, measure), short_names(cell.rows, LONGEST_LABEL)
        line = goal if goal is not None and goal.measure == measure else None
        what = f"Validation {cell.problem.loss if measure == LOSS else measure.label}"
        named: dict[Against, str] = {"epochs": "epochs", "seconds": "seconds of training"}
        return [
            Figure(f"{what} against {words}", self._curves(series, names, against, measure, line, words))
            for against, words in named.items()
        ]

    def _curves(
        self,
        series: Sequence[Series],
        names: Sequence[str],
        against: Against,
        measure: Measure,
        goal: Goal | None,
        words: str,
    ) -> Markup:
        # Beside the lines there is little room, and the legend has the whole of each name.
        ends_of = [item.called(name) for item, name in zip(series, names, strict=True)]
        drawn = [item for item in ends_of if item.band is not None and item.rank < MOST_COLOURED]
        length = room_for([item.name for item in drawn])
        room = max(length, 0 if goal is None else len(f"goal {goal.text}"))
        value = None if goal is None else goal.value

        def draw(figure: Any, axes: Any) -> None:
            draw_curves(axes, series, self.paint, against, measure=measure, goal=value)
            named = ends_of if length else []
            label_ends(figure, axes, named, self.paint, against, most=MOST_COLOURED, length=length, goal=goal)

        ends = [f"{item.label} {measure.text(item.band.middle[-1])}" for item in series if item.band is not None]
        found = f"Medians at the end: {', '.join(ends) or 'no run finished'}."
        return self.figure(draw, f"Validation {measure.label} against {words}. {found}", room=room)

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
