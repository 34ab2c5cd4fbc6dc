"""The runs of a row as lines: median and range of the finished ones, and those that did not finish."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from steepest.report.groups import Cell, Row
from steepest.report.measure import LOSS, Measure
from steepest.report.palette import Look, looks
from steepest.training.records import EpochPoint

__all__ = ["Band", "Lost", "Series", "band", "series_of"]


@dataclass(frozen=True)
class Band:
    """Median, smallest and largest of a number over several runs, epoch by epoch.

    Attributes:
        epochs: The epochs.
        seconds: Median training time at each.
        middle: Median of the number; NaN where it is not finite.
        low: The smallest.
        high: The largest finite one.
    """

    epochs: tuple[float, ...]
    seconds: tuple[float, ...]
    middle: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Lost:
    """Validation loss or metric of a run that did not finish, as far as it was finite."""

    epochs: tuple[float, ...]
    seconds: tuple[float, ...]
    values: tuple[float, ...]


@dataclass(frozen=True)
class Series:
    """What a plot shows of one row.

    Attributes:
        name: Name of the row.
        label: The same, with the count of runs where some did not finish.
        look: Colour and dashes.
        band: The finished runs, None if there are none.
        lost: The others.
        rank: Place by mean final loss, from 0.
    """

    name: str
    label: str
    look: Look
    band: Band | None
    lost: tuple[Lost, ...]
    rank: int

    def called(self, name: str) -> "Series":
        """The same by another name."""
        return replace(self, name=name, label=name + self.label.removeprefix(self.name))


def series_of(cell: Cell, measure: Measure = LOSS) -> list[Series]:
    """What a plot of the validation loss, or of a metric on the validation split, shows.

    Ranks are by loss in both, so that the plots of a cell share one legend.

    Args:
        cell: Runs that may be compared.
        measure: What is plotted.

    Returns:
        One series per row.
    """
    finals = [_final(row) for row in cell.rows]
    order = sorted(range(len(finals)), key=lambda place: finals[place])
    found = []
    for place, (row, look) in enumerate(zip(cell.rows, looks(cell.rows), strict=True)):
        runs, done = len(row.records), len(row.finished)
        label = row.label if done in {0, runs} else f"{row.label} ({done} of {runs} runs)"
        histories = [record.history for record in row.finished if record.history]
        lost = tuple(part for record in row.unfinished if (part := _lost(record.history, measure)) is not None)
        middle = band(histories, measure.of, worst=measure.worst)
        found.append(Series(row.label, label, look, middle, lost, order.index(place)))
    return found


def _final(row: Row) -> float:
    losses = [record.final.val_loss for record in row.finished if record.final is not None]
    present = [loss for loss in losses if loss is not None]
    return sum(present) / len(present) if present else math.inf


def band(
    histories: Sequence[Sequence[EpochPoint]],
    read: Callable[[EpochPoint], float | None] = LOSS.of,
    *,
    worst: float = math.inf,
) -> Band | None:
    """Join runs; points that not every run reached are left out.

    Args:
        histories: Points of each run.
        read: The number of a point; None where it is not finite.
        worst: What such a point counts as: leaving it out would flatter the median.

    Returns:
        The band, or None if no point has the number.
    """
    rows = []
    for points in zip(*histories, strict=False):
        values = [read(point) for point in points]
        present = [value for value in values if value is not None]
        if present:
            middle = median(worst if value is None else value for value in values)
            shown = middle if math.isfinite(middle) else math.nan
            seconds = median(point.seconds for point in points)
            rows.append((float(points[0].epoch), seconds, shown, min(present), max(present)))
    return Band(*zip(*rows, strict=True)) if rows else None


def _lost(history: Sequence[EpochPoint], measure: Measure) -> Lost | None:
    points = [
        (float(point.epoch), point.seconds, value) for point in history if (value := measure.of(point)) is not None
    ]
    return Lost(*zip(*points, strict=True)) if points else None
