"""The runs of a row as lines: median and range of the finished ones, and those that did not finish."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from steepest.report.groups import Cell, Row
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
    """Validation loss of a run that did not finish, as far as it was finite."""

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


def series_of(cell: Cell) -> list[Series]:
    """What a plot of the validation loss shows.

    Args:
        cell: Runs that may be compared.

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
        lost = tuple(part for record in row.unfinished if (part := _lost(record.history)) is not None)
        found.append(Series(row.label, label, look, band(histories), lost, order.index(place)))
    return found


def _final(row: Row) -> float:
    losses = [record.final.val_loss for record in row.finished if record.final is not None]
    present = [loss for loss in losses if loss is not None]
    return sum(present) / len(present) if present else math.inf


def band(histories: Sequence[Sequence[EpochPoint]], number: str | None = None) -> Band | None:
    """Join runs; points that not every run reached are left out.

    Args:
        histories: Points of each run.
        number: Name of a diagnostic; None takes the validation loss.

    Returns:
        The band, or None if no point has the number.
    """
    rows = []
    for points in zip(*histories, strict=False):
        values = [point.val_loss if number is None else point.diagnostics.get(number) for point in points]
        present = [value for value in values if value is not None]
        if present:
            # A run that is not finite counts as infinitely high: leaving it out would flatter the median.
            middle = median(math.inf if value is None else value for value in values)
            shown = middle if math.isfinite(middle) else math.nan
            seconds = median(point.seconds for point in points)
            rows.append((float(points[0].epoch), seconds, shown, min(present), max(present)))
    return Band(*zip(*rows, strict=True)) if rows else None


def _lost(history: Sequence[EpochPoint]) -> Lost | None:
    points = [(float(point.epoch), point.seconds, point.val_loss) for point in history if point.val_loss is not None]
    return Lost(*zip(*points, strict=True)) if points else None
