"""Kept rank and singular values, drawn from what the optimizers say about their own steps."""

import math
from collections.abc import Sequence
from typing import Any

from steepest.report.axis import count_epochs, fit_axis, scale_of
from steepest.report.charts import LONGEST_LABEL, Charts, Figure, room_for
from steepest.report.curves import Series, band
from steepest.report.groups import Row
from steepest.report.labels import label_ends, shortened
from steepest.report.palette import Look
from steepest.report.plot import MOST_COLOURED
from steepest.report.style import Paint
from steepest.report.words import number
from steepest.training.records import EpochPoint

__all__ = ["rank_figure", "spectra_of", "spectrum_figure"]

_CAPTION_LENGTH = 40


def rank_figure(charts: Charts, rows: Sequence[tuple[Row, Look]]) -> Figure:
    """Kept rank against epochs, median and range over the seeds.

    Args:
        charts: Draws the figure.
        rows: Rows that report a rank, with their looks.

    Returns:
        The figure.
    """
    series = [
        Series(row.label, row.label, look, band(_diagnosed(row), _rank), (), place)
        for place, (row, look) in enumerate(rows)
    ]
    conditions = [point.diagnostics.get("rows") for row, _ in rows for run in _diagnosed(row) for point in run]
    most = max((value for value in conditions if value is not None), default=None)
    room = room_for([item.name for item in series])

    def draw(figure: Any, axes: Any) -> None:
        _draw_ranks(axes, series, charts.paint, most)
        if room:
            label_ends(figure, axes, series, charts.paint, "epochs", most=MOST_COLOURED, length=LONGEST_LABEL)

    ends = [f"{item.label} {item.band.middle[-1]:g}" for item in series if item.band is not None]
    svg = charts.figure(draw, f"Kept rank against epochs. At the end: {', '.join(ends)}.", room=room)
    return Figure("Directions that a step uses (kept rank)", svg)


def _rank(point: EpochPoint) -> float | None:
    return point.diagnostics.get("rank")


def _draw_ranks(axes: Any, series: Sequence[Series], paint: Paint, most: float | None) -> None:
    from matplotlib.ticker import MaxNLocator

    for item in series:
        if item.band is not None:
            colour, x = paint.line(item.look), item.band.epochs
            axes.fill_between(x, item.band.low, item.band.high, color=colour, alpha=0.16, linewidth=0)
            axes.plot(x, item.band.middle, color=colour, linewidth=2.0, marker="o", markersize=2.5)
    if most is not None:
        axes.axhline(most, color=paint.muted, linewidth=0.9, dashes=(5, 4))
        place = {"xytext": (2, 3), "textcoords": "offset points", "va": "bottom", "ha": "left"}
        where = axes.get_yaxis_transform()
        axes.annotate(f"all {most:g} rows of a batch", (0, most), xycoords=where, color=paint.muted, **place)
    axes.grid(visible=True, axis="y", which="major")
    axes.set_axisbelow(True)
    axes.set_ylim(0, None if most is None else 1.15 * most)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlim(left=0)
    count_epochs(axes)


def _diagnosed(row: Row) -> list[tuple[EpochPoint, ...]]:
    """Points with diagnostics, of the finished runs or, where there are none, of all."""
    histories = [
        tuple(point for point in record.history if point.diagnostics) for record in row.finished or row.records
    ]
    return [history for history in histories if history]


def spectrum_figure(charts: Charts, row: Row, look: Look) -> Figure:
    """Singular values at the first, a middle and the last epoch of the first run that finished.

    Args:
        charts: Draws the figure.
        row: A row that reports spectra.
        look: How it is drawn.

    Returns:
        The figure.
    """
    points = spectra_of(row)
    falls = [f"epoch {point.epoch}: smallest {number(min(_relative(point)))}" for point in points]
    svg = charts.figure(
        lambda _figure, axes: _draw_spectra(axes, points, charts.paint.line(look)),
        f"Singular values of {row.label}, largest first, divided by the largest. {'; '.join(falls)}.",
    )
    return Figure(f"Singular values of {shortened(row.label, _CAPTION_LENGTH)}, divided by the largest", svg)


def _draw_spectra(axes: Any, points: Sequence[EpochPoint], colour: str) -> None:
    styles: list[dict[str, Any]] = [{"linestyle": ":"}, {"dashes": (4, 2)}, {"linestyle": "-"}]
    every: list[float] = []
    for point, style in zip(points, styles[-len(points) :], strict=True):
        values = [value if value > 0 else math.nan for value in _relative(point)]
        places = [100 * place / (len(values) - 1) for place in range(len(values))]
        axes.plot(places, values, color=colour, linewidth=1.8, **style)
        every += values
    # The lines may lie on each other: a legend, and no labels at the ends.
    names = [f"epoch {point.epoch}" for point in points]
    axes.legend(axes.get_lines(), names, frameon=False, loc="lower left", handlelength=2.6)
    fit_axis(axes, scale_of(every))
    axes.set_xlim(0, 100)
    axes.set_xlabel("place in the spectrum, % of its length")


def _relative(point: EpochPoint) -> list[float]:
    spectrum = point.series["spectrum"]
    return [value / spectrum[0] for value in spectrum]


def spectra_of(row: Row) -> list[EpochPoint]:
    """The first, a middle and the last point with a spectrum, of the first run that has any.

    Args:
        row: Runs of one optimizer.

    Returns:
        At most three points.
    """
    for record in row.finished or row.records:
        points = [point for point in record.history if _usable(point.series.get("spectrum", ()))]
        if points:
            return [points[place] for place in sorted({0, len(points) // 2, len(points) - 1})]
    return []


def _usable(spectrum: Sequence[float]) -> bool:
    return len(spectrum) > 1 and spectrum[0] > 0 and all(math.isfinite(value) for value in spectrum)
