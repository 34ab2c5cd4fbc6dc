"""Validation loss against epochs or seconds: how it is drawn, and as files of its own."""

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from steepest.report.axis import count_epochs, fit_axis, scale_of
from steepest.report.curves import Lost, Series, series_of
from steepest.report.groups import Cell
from steepest.report.labels import label_ends
from steepest.report.style import FilePaint, Paint, file_style
from steepest.training.files import write_atomically

__all__ = ["MOST_COLOURED", "Against", "draw_losses", "save_loss_plot"]

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


def draw_losses(
    axes: Any,
    series: Sequence[Series],
    paint: Paint,
    against: Against,
    *,
    goal: float | None = None,
    width: float = 2.0,
) -> None:
    """Draw median lines, ranges, runs that did not finish and the goal.

    Args:
        axes: Matplotlib axes.
        series: What to draw.
        paint: In which colours.
        against: What the horizontal axis is.
        goal: Validation loss to reach.
        width: Width of the lines.
    """
    pen = _Pen(axes, paint, against, width)
    spans = [span for item in series if item.band for span in (item.band.low, item.band.high)]
    shown = spans or [lost.values for item in series for lost in item.lost]
    scale = scale_of([value for values in shown for value in values])
    for item in sorted(series, key=lambda item: -item.rank):
        _draw(pen, item, scale.top)
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
        axes.text(0.5, 0.5, "no finite loss was recorded", transform=axes.transAxes, ha="center", color=paint.muted)


def _reach(series: Sequence[Series], against: Against) -> float:
    """Where the horizontal axis ends."""
    lines = [line for item in series for line in (item.band, *item.lost) if line is not None]
    return 1.04 * max((getattr(line, against)[-1] for line in lines), default=0.0)


def _draw(pen: _Pen, item: Series, top: float) -> None:
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
        _draw_lost(pen, lost, colour, top)


def _draw_lost(pen: _Pen, lost: Lost, colour: str, top: float) -> None:
    """A dotted line up to the edge of the plot or the last finite loss, and a cross there."""
    over = next((place for place, value in enumerate(lost.values) if value > top), len(lost.values) - 1)
    x = getattr(lost, pen.against)[: over + 1]
    y = [min(value, top) for value in lost.values[: over + 1]]
    pen.axes.plot(x, y, color=colour, linewidth=0.6 * pen.width, linestyle=":", zorder=1.8)
    pen.axes.plot(x[-1], y[-1], "x", color=colour, markersize=3 * pen.width, clip_on=False, zorder=3)


def save_loss_plot(cell: Cell, folder: Path, *, subtitle: str = "") -> list[Path]:
    """Draw the loss against seconds and save it as SVG and PNG.

    Args:
        cell: Runs that may be compared.
        folder: Where to, made when missing.
        subtitle: Line under the title.

    Returns:
        The files.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(file_style()):
        figure = Figure(figsize=(8.0, 4.8))
        FigureCanvasAgg(figure)
        series = series_of(cell)
        longest = max((min(len(item.label), _LONGEST_LABEL) for item in series[:MOST_COLOURED]), default=0)
        axes = figure.add_axes((0.09, 0.12, 0.87 - _LETTER * longest, 0.70))
        draw_losses(axes, series, FilePaint(), "seconds", width=2.2)
        figure.text(0.025, 0.945, f"{cell.title}: validation {cell.problem.loss}", fontsize=14, fontweight="bold")
        figure.text(0.025, 0.885, subtitle, fontsize=10, color=FilePaint.muted)
        label_ends(figure, axes, series, FilePaint(), "seconds", most=MOST_COLOURED, length=longest)
        # Drawn into memory first: a full disk or a kill then leaves no half-written picture.
        kinds: dict[str, dict[str, Any]] = {"svg": {"metadata": {"Date": None}}, "png": {"dpi": 150}}
        return [_save(figure.savefig, folder / f"{cell.stem}.{kind}", options) for kind, options in kinds.items()]


def _save(save: Callable[..., None], path: Path, options: dict[str, Any]) -> Path:
    content = io.BytesIO()
    save(content, format=path.suffix[1:], **options)
    write_atomically(path, content.getvalue())
    return path
