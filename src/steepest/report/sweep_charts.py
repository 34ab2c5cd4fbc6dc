"""Epochs, seconds and FOP's r against the batch size: in the report, and as files of their own."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import Any

from steepest.report.axis import Scale, fit_axis
from steepest.report.charts import LONGEST_LABEL, Charts, Figure, room_for
from steepest.report.curves import Band, Series
from steepest.report.labels import label_ends
from steepest.report.palette import looks_of
from steepest.report.plot import MOST_COLOURED, file_axes, longest_label, save_figure
from steepest.report.style import FilePaint, Paint
from steepest.report.sweep import Sweep, SweepPlace
from steepest.report.words import number

__all__ = ["Chart", "charts_of", "draw_sweep", "save_sweep_plots", "sweep_figure", "sweep_series"]

# Sideways steps between the markers of one batch size, as parts of the axis and of the gap to the next size.
_STEP, _SHARE = 0.016, 0.4
# A logarithmic axis of less has no round number on it; room is left at its ends; labels of sizes need their width.
_LEAST_RATIO, _ROOM, _TICK_ROOM = 3.0, 0.08, 0.1


@dataclass(frozen=True)
class Chart:
    """A number against the batch size.

    Attributes:
        key: Name for its files.
        caption: Words above it.
        read: The number of one place, None where there is none.
        log: Whether the number is one that is compared by ratios.
    """

    key: str
    caption: str
    read: Callable[[SweepPlace], float | None]
    log: bool = True


def charts_of(sweep: Sweep) -> list[Chart]:
    """What can be drawn of a sweep.

    Args:
        sweep: The sweep.

    Returns:
        Those charts that have a marker somewhere above 0.
    """
    goal = "" if sweep.goal is None else f"to a {sweep.goal.measure.words} of {sweep.goal.text}"
    every = [
        Chart("epochs", f"Epochs {goal}", lambda place: None if place.reach is None else place.reach.epochs),
        Chart("seconds", f"Seconds {goal}", lambda place: None if place.reach is None else place.reach.seconds),
        Chart("r", "Measured r of FOP's projection", lambda place: place.r, log=False),
    ]
    return [chart for chart in every if any(chart.read(place) for place in _places(sweep))]


def _places(sweep: Sweep) -> list[SweepPlace]:
    return [place for row in sweep.rows for place in row.places if place is not None]


def sweep_series(sweep: Sweep, read: Callable[[SweepPlace], float | None]) -> list[Series]:
    """The lines of a chart: their points are the batch sizes where there is a number.

    Args:
        sweep: The sweep.
        read: The number of one place.

    Returns:
        One series per row; those with the lowest mean validation loss rank first.
    """
    means = [_mean_loss(row.places) for row in sweep.rows]
    order = sorted(range(len(means)), key=lambda place: means[place])
    drawn = [
        index for index, row in enumerate(sweep.rows) if any(p is not None and read(p) is not None for p in row.places)
    ]
    step, found = _step(sweep.sizes, len(drawn)), []
    for index, (row, look) in enumerate(zip(sweep.rows, looks_of([row.optimizer for row in sweep.rows]), strict=True)):
        # Markers that lie on each other would hide each other: small numbers of epochs are often equal.
        factor = 2 ** (step * (drawn.index(index) - (len(drawn) - 1) / 2)) if index in drawn else 1.0
        points = [
            (size * factor, value)
            for size, place in zip(sweep.sizes, row.places, strict=True)
            if place is not None and (value := read(place)) is not None
        ]
        x, y = tuple(x for x, _ in points), tuple(y for _, y in points)
        found.append(
            Series(row.label, row.label, look, Band(x, x, y, y, y) if points else None, (), order.index(index))
        )
    return found


def _mean_loss(places: Sequence[SweepPlace | None]) -> float:
    found = [place.finals["val_loss"].mean for place in places if place is not None and "val_loss" in place.finals]
    return fmean(found) if found else math.inf


def _step(sizes: Sequence[int], lines: int) -> float:
    """Octaves between two markers of one batch size."""
    octaves = [math.log2(size) for size in sizes]
    gap = min(after - before for before, after in pairwise(octaves))
    return min(_STEP * (octaves[-1] - octaves[0]), _SHARE * gap / max(lines, 1))


def sweep_figure(charts: Charts, sweep: Sweep, chart: Chart) -> Figure:
    """Draw a chart for the page.

    Args:
        charts: Draws the figure.
        sweep: The sweep.
        chart: What is drawn.

    Returns:
        The figure.
    """
    series = sweep_series(sweep, chart.read)
    room = room_for([item.name for item in series if item.band is not None and item.rank < MOST_COLOURED])

    def draw(figure: Any, axes: Any) -> None:
        draw_sweep(axes, sweep, chart, series, charts.paint)
        if room:
            label_ends(figure, axes, series, charts.paint, "epochs", most=MOST_COLOURED, length=LONGEST_LABEL)

    svg = charts.figure(draw, f"{chart.caption} against batch size. {_told(sweep, chart)}", room=room)
    return Figure(chart.caption, svg)


def _told(sweep: Sweep, chart: Chart) -> str:
    parts = []
    for row in sweep.rows:
        values = [
            (size, None if place is None else chart.read(place))
            for size, place in zip(sweep.sizes, row.places, strict=True)
        ]
        parts.append(f"{row.label}: {', '.join(f'{number(value)} at {size}' for size, value in values)}.")
    return " ".join(parts)


def save_sweep_plots(sweep: Sweep, folder: Path, *, subtitle: str = "") -> list[Path]:
    """Draw the charts and save them as SVG and PNG.

    Args:
        sweep: The sweep.
        folder: Where to, made when missing.
        subtitle: Of what the marks are medians: the line under the titles.

    Returns:
        The files.
    """
    files, name = [], f"{sweep.task} ({sweep.variant})" if sweep.variant else sweep.task
    for chart in charts_of(sweep):
        series = sweep_series(sweep, chart.read)
        longest = longest_label([item.name for item in series if item.band is not None])
        title = f"{name}: {chart.caption[0].lower()}{chart.caption[1:]}"
        with file_axes(title, subtitle and f"median of {subtitle}", longest) as (figure, axes):
            draw_sweep(axes, sweep, chart, series, FilePaint(), width=2.2)
            label_ends(figure, axes, series, FilePaint(), "epochs", most=MOST_COLOURED, length=longest)
            files += save_figure(figure, folder / f"{sweep.stem}-{chart.key}")
    return files


def draw_sweep(
    axes: Any, sweep: Sweep, chart: Chart, series: Sequence[Series], paint: Paint, *, width: float = 2.0
) -> None:
    """Draw a chart.

    Args:
        axes: Matplotlib axes.
        sweep: The sweep.
        chart: What is drawn.
        series: Its lines, one per row of the sweep.
        paint: In which colours.
        width: Width of the lines.
    """
    values = [value for item in series if item.band is not None for value in item.band.middle]
    for item, row in sorted(zip(series, sweep.rows, strict=True), key=lambda pair: -pair[0].rank):
        if item.band is not None:
            _draw_line(axes, item, row.places, chart, paint, width)
    fit_axis(axes, _scale(values, log=chart.log))
    _fit_sizes(axes, sweep.sizes)


def _draw_line(
    axes: Any, item: Series, places: Sequence[SweepPlace | None], chart: Chart, paint: Paint, width: float
) -> None:
    """A line that is broken where a batch size has no number; hollow markers where not all runs have one."""
    coloured = item.rank < MOST_COLOURED
    colour = paint.line(item.look) if coloured else paint.grid
    points, x, y = iter(zip(item.band.epochs, item.band.middle, strict=True)) if item.band else iter(()), [], []
    hollow = []
    for place in places:
        present = place is not None and chart.read(place) is not None
        at, value = next(points) if present else (math.nan, math.nan)
        x.append(at)
        y.append(value)
        hollow.append(present and chart.log and _some_missed(place))
    style = {"dashes": item.look.dashes} if item.look.dashes and coloured else {}
    axes.plot(x, y, color=colour, linewidth=width if coloured else 0.6 * width, **style)
    for at, value, empty in zip(x, y, hollow, strict=True):
        fill = paint.paper if empty else colour
        axes.plot(at, value, "o", color=colour, markerfacecolor=fill, markersize=3 * width, markeredgewidth=0.7 * width)


def _some_missed(place: SweepPlace | None) -> bool:
    return place is not None and place.reach is not None and place.reach.reached < place.reach.attempted


def _scale(values: Sequence[float], *, log: bool) -> Scale:
    low, high = min(values), max(values)
    # An untrained model that meets the goal does so after 0 epochs, which no logarithmic axis has.
    if not log or low <= 0:
        return Scale(0.0, 1.1 * high or 1.0, log=False)
    room = max((high / low) ** _ROOM, (_LEAST_RATIO * low / high) ** 0.5)
    return Scale(low / room, high * room, log=True)


def _fit_sizes(axes: Any, sizes: Sequence[int]) -> None:
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    octaves = math.log2(sizes[-1] / sizes[0])
    room = 2 ** (_ROOM * octaves)
    axes.set_xscale("log", base=2)
    axes.set_xlim(sizes[0] / room, sizes[-1] * room)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_locator(FixedLocator(list(sizes)))
    labels, last = [], math.inf
    for size in reversed(sizes):
        roomy = math.log2(last / size) > _TICK_ROOM * octaves if math.isfinite(last) else True
        labels.append(f"{size}" if roomy else "")
        last = size if roomy else last
    axes.xaxis.set_major_formatter(FixedFormatter(labels[::-1]))
    axes.set_xlabel("batch size")
