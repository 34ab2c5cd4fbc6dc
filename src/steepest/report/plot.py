"""Validation loss or metric against epochs or seconds: how it is drawn, and as files of its own."""

import io
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steepest.report.axis import Scale, count_epochs, fit_axis, scale_of
from steepest.report.curves import Lost, Series, series_of
from steepest.report.goal import Goal
from steepest.report.groups import Cell
from steepest.report.labels import label_ends
from steepest.report.measure import LOSS, Measure
from steepest.report.names import short_names
from steepest.report.style import FilePaint, Paint, file_style
from steepest.training.files import write_atomically

__all__ = ["MOST_COLOURED", "Against", "draw_curves", "file_axes", "longest_label", "save_figure", "save_plots"]

Against = Literal["epochs", "seconds"]
# More lines than this in colours of their own cannot be told apart: the others are drawn in grey.
MOST_COLOURED = 8
# Of a plot in a file: characters of a label, and what one takes of the width.
_LONGEST_LABEL, _LETTER = 28, 0.0125


@dataclass(frozen=True)
class _Pen:
    axes: Any
    paint: Paint
    against: Against
    width: float
    scale: Scale
    higher_is_better: bool


def draw_curves(
    axes: Any,
    series: Sequence[Series],
    paint: Paint,
    against: Against,
    *,
    measure: Measure = LOSS,
    goal: float | None = None,
    width: float = 2.0,
) -> None:
    """Draw median lines, ranges, runs that did not finish and the goal.

    Args:
        axes: Matplotlib axes.
        series: What to draw.
        paint: In which colours.
        against: What the horizontal axis is.
        measure: What the vertical axis is.
        goal: Value of it to reach.
        width: Width of the lines.
    """
    spans = [span for item in series if item.band for span in (item.band.low, item.band.high)]
    shown = spans or [lost.values for item in series for lost in item.lost]
    # What is better when higher is a share or a ratio: on a logarithmic axis its good values would lie on each other,
    # and its goal, unlike a loss's, is never too far away to be shown.
    higher = measure.higher_is_better
    aims = [goal] if higher and goal is not None else []
    scale = scale_of([value for values in (*shown, aims) for value in values], may_log=not higher)
    pen = _Pen(axes, paint, against, width, scale, higher)
    for item in sorted(series, key=lambda item: -item.rank):
        _draw(pen, item)
    if goal is not None and scale.low <= goal <= scale.top:
        axes.axhline(goal, color=paint.muted, linewidth=0.9, dashes=(5, 4), zorder=1.5)
    fit_axis(axes, scale)
    # Points of the untrained model alone have no width.
    axes.set_xlim(0, _reach(series, against) or 1.0)
    if against == "epochs":
        count_epochs(axes)
    else:
        axes.set_xlabel("seconds of training (evaluation not counted)")
    if not any(math.isfinite(value) for values in shown for value in values):
        words = f"no finite {measure.label} was recorded"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", color=paint.muted)


def _reach(series: Sequence[Series], against: Against) -> float:
    """Where the horizontal axis ends."""
    lines = [line for item in series for line in (item.band, *item.lost) if line is not None]
    return 1.04 * max((getattr(line, against)[-1] for line in lines), default=0.0)


def _draw(pen: _Pen, item: Series) -> None:
    coloured = item.rank < MOST_COLOURED
    colour = pen.paint.line(item.look) if coloured else pen.paint.grid
    width = pen.width if coloured else pen.width * 0.6
    if item.band is not None:
        x = getattr(item.band, pen.against)
        if coloured:
            pen.axes.fill_between(x, item.band.low, item.band.high, color=colour, alpha=0.16, linewidth=0)
        style = {"dashes": item.look.dashes} if item.look.dashes and coloured else {"solid_capstyle": "round"}
        pen.axes.plot(x, item.band.middle, color=colour, linewidth=width, **style)
        if coloured:
            pen.axes.plot(x[-1], item.band.middle[-1], "o", color=colour, markersize=2.4 * width, clip_on=False)
    for lost in item.lost:
        _draw_lost(pen, lost, colour)


def _draw_lost(pen: _Pen, lost: Lost, colour: str) -> None:
    """A dotted line up to the bad edge of the plot or the last finite value, and a cross there."""
    low, top = pen.scale.low, pen.scale.top
    beyond = [value < low if pen.higher_is_better else value > top for value in lost.values]
    over = beyond.index(True) if any(beyond) else len(beyond) - 1
    x = getattr(lost, pen.against)[: over + 1]
    y = [max(value, low) if pen.higher_is_better else min(value, top) for value in lost.values[: over + 1]]
    pen.axes.plot(x, y, color=colour, linewidth=0.6 * pen.width, linestyle=":", zorder=1.8)
    pen.axes.plot(x[-1], y[-1], "x", color=colour, markersize=3 * pen.width, clip_on=False, zorder=3)


def save_plots(cell: Cell, folder: Path, *, goal: Goal | None = None, subtitle: str = "") -> list[Path]:
    """Draw the loss, and the metric that a goal is a value of, against seconds, and save them as SVG and PNG.

    Args:
        cell: Runs that may be compared.
        folder: Where to, made when missing.
        goal: Who reached what when.
        subtitle: Of what the lines are medians and ranges: the line under the title.

    Returns:
        The files.
    """
    files = _save_curves(cell, folder / cell.stem, None, subtitle)
    if goal is not None and goal.measure != LOSS:
        place = folder / f"{cell.stem}-{re.sub(r'[^A-Za-z0-9_]+', '_', goal.metric)}"
        files += _save_curves(cell, place, goal, subtitle)
    return files


def _save_curves(cell: Cell, place: Path, goal: Goal | None, subtitle: str) -> list[Path]:
    measure, value = (LOSS, None) if goal is None else (goal.measure, goal.value)
    what = f"validation {cell.problem.loss}" if measure == LOSS else measure.words
    names = short_names(cell.rows, _LONGEST_LABEL, shared=True)
    series = [item.called(name) for item, name in zip(series_of(cell, measure), names, strict=True)]
    longest = longest_label([item.label for item in series[:MOST_COLOURED]] + ([f"goal {goal.text}"] if goal else []))
    under = subtitle and f"median and range of {subtitle}"
    with file_axes(f"{cell.title}: {what}", under, longest) as (figure, axes):
        draw_curves(axes, series, FilePaint(), "seconds", measure=measure, goal=value, width=2.2)
        label_ends(figure, axes, series, FilePaint(), "seconds", most=MOST_COLOURED, length=longest, goal=goal)
        return save_figure(figure, place)


def longest_label(labels: Sequence[str]) -> int:
    """Characters to leave room for beside the lines of a plot in a file.

    Args:
        labels: What should stand there.

    Returns:
        The longest length, and at most that of the longest label allowed.
    """
    return max((min(len(label), _LONGEST_LABEL) for label in labels), default=0)


@contextmanager
def file_axes(title: str, subtitle: str, longest: int) -> Iterator[tuple[Any, Any]]:
    """A figure for a file of its own.

    Args:
        title: Its heading.
        subtitle: Line under that.
        longest: Characters to leave room for beside the lines.

    Yields:
        The figure and its axes.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(file_style()):
        figure = Figure(figsize=(8.0, 4.8))
        FigureCanvasAgg(figure)
        figure.text(0.025, 0.945, title, fontsize=14, fontweight="bold")
        figure.text(0.025, 0.885, subtitle, fontsize=10, color=FilePaint.muted)
        yield figure, figure.add_axes((0.09, 0.12, 0.855 - _LETTER * longest, 0.70))


def save_figure(figure: Any, place: Path) -> list[Path]:
    """Save a figure as SVG and PNG.

    Args:
        figure: Matplotlib figure.
        place: Path of the files without their endings; the folder is made when missing.

    Returns:
        The files.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    # Drawn into memory first: a full disk or a kill then leaves no half-written picture.
    kinds: dict[str, dict[str, Any]] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 150}}
    return [_save(figure.savefig, place.with_name(f"{place.name}.{kind}"), options) for kind, options in kinds.items()]


def _save(save: Callable[..., None], path: Path, options: dict[str, Any]) -> Path:
    content = io.BytesIO()
    save(content, format=path.suffix[1:], **options)
    write_atomically(path, content.getvalue())
    return path
