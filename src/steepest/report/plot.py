"""Loss against seconds, as SVG and PNG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steepest.report.labels import spread_positions
from steepest.report.style import colour_of, style
from steepest.report.summary import median_or_none
from steepest.training.records import RunRecord, write_atomically
from steepest.training.registry import optimizers, tasks

__all__ = ["Curve", "curves", "save_loss_plot"]


_TWO_DECADES, _HALF_DECADE = 100.0, 5.0


@dataclass(frozen=True)
class Curve:
    """Validation loss of one optimizer over the finished runs, epoch by epoch.

    Attributes:
        optimizer: Registry name.
        label: Name for people, with the count of runs where some did not finish.
        seconds: Median training time at each epoch.
        middle: Median loss.
        low: Smallest loss.
        high: Largest loss.
    """

    optimizer: str
    label: str
    seconds: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


def curves(records: Sequence[RunRecord]) -> list[Curve]:
    """Join the runs of each optimizer; epochs that not every run reached are left out.

    Args:
        records: Records of one task.

    Returns:
        One curve per optimizer that finished at least one run.
    """
    found = []
    for name in dict.fromkeys(record.optimizer for record in records):
        runs = [record for record in records if record.optimizer == name]
        finished = [record for record in runs if record.status == "finished"]
        if finished:
            found.append(_curve(name, finished, len(runs)))
    return found


def _curve(name: str, finished: Sequence[RunRecord], attempted: int) -> Curve:
    columns = list(zip(*(record.history for record in finished), strict=False))
    points = []
    for column in columns:
        losses = [point.val_loss for point in column if point.val_loss is not None and point.val_loss > 0]
        seconds = median_or_none([point.seconds for point in column])
        middle = median_or_none(losses)
        if seconds is not None and middle is not None:
            points.append((seconds, middle, min(losses), max(losses)))
    label = optimizers()[name].label
    if len(finished) < attempted:
        label += f" ({len(finished)} of {attempted} runs)"
    seconds_, middle_, low, high = zip(*points, strict=True) if points else ((), (), (), ())
    return Curve(name, label, seconds_, middle_, low, high)


def save_loss_plot(records: Sequence[RunRecord], folder: Path, *, subtitle: str = "") -> list[Path]:
    """Draw one task and save it as SVG and PNG.

    Args:
        records: Records of one task.
        folder: Where to, made when missing.
        subtitle: Line under the title.

    Returns:
        The files.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    task = tasks()[records[0].task]
    paths = []
    with mpl.rc_context(style()):
        figure = Figure(figsize=(8.0, 4.8))
        FigureCanvasAgg(figure)
        axes = figure.add_axes((0.09, 0.12, 0.73, 0.70))
        drawn = curves(records)
        for curve in drawn:
            _draw(axes, curve)
        _decorate(figure, axes, f"{task.name}: validation {task.loss.name}", subtitle)
        _label_few_decades(axes)
        _label_ends(figure, axes, drawn)
        for kind, options in (("svg", {"metadata": {"Date": None}}), ("png", {"dpi": 150})):
            # Drawn into memory first: a full disk or a kill then leaves no half-written picture.
            content = io.BytesIO()
            figure.savefig(content, format=kind, **options)
            path = folder / f"{task.name}.{kind}"
            write_atomically(path, content.getvalue())
            paths.append(path)
    return paths


def _draw(axes: Any, curve: Curve) -> None:
    colour = colour_of(curve.optimizer)
    axes.fill_between(curve.seconds, curve.low, curve.high, color=colour, alpha=0.16, linewidth=0)
    axes.plot(curve.seconds, curve.middle, color=colour, linewidth=2.2, solid_capstyle="round")
    if curve.seconds:
        axes.plot(curve.seconds[-1], curve.middle[-1], "o", color=colour, markersize=5.5)


def _decorate(figure: Any, axes: Any, title: str, subtitle: str) -> None:
    axes.set_yscale("log")
    axes.set_xlabel("seconds of training (evaluation not counted)")
    axes.set_xlim(left=0)
    axes.grid(visible=True, axis="y", which="major")
    figure.text(0.025, 0.945, title, fontsize=14, fontweight="bold", va="center")
    if subtitle:
        figure.text(0.025, 0.885, subtitle, fontsize=10, color="#555555", va="center")


def _label_few_decades(axes: Any) -> None:
    """Powers of ten alone leave an axis of less than two decades without labels: add 2 and 5, or every digit."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    if high / low >= _TWO_DECADES:
        return
    digits = (1.0, 2.0, 5.0) if high / low >= _HALF_DECADE else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _label_ends(figure: Any, axes: Any, drawn: Sequence[Curve]) -> None:
    """Name each curve at its right end, moved apart where ends are close, with a thin line to the end."""
    ends = [curve for curve in drawn if curve.seconds]
    figure.canvas.draw()
    box = axes.get_window_extent()
    heights = [axes.transData.transform((c.seconds[-1], c.middle[-1]))[1] for c in ends]
    wanted = [(height - box.y0) / box.height for height in heights]
    for curve, position in zip(ends, spread_positions(wanted, gap=0.075), strict=True):
        colour = colour_of(curve.optimizer)
        axes.annotate(
            curve.label,
            xy=(curve.seconds[-1], curve.middle[-1]),
            xytext=(1.02, position),
            textcoords="axes fraction",
            color=colour,
            fontsize=11,
            fontweight="bold",
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.8, "alpha": 0.5, "shrinkB": 4},
        )
