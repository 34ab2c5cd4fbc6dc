"""Optimizers by batch sizes, as tables."""

from collections.abc import Callable, Sequence

from steepest.report.columns import metric_text
from steepest.report.grids import Entry, Grid
from steepest.report.measure import LOSS, Measure
from steepest.report.sweep import Sweep, SweepPlace, measures_of
from steepest.report.words import number

__all__ = ["sweep_grids"]

_Column = Sequence[SweepPlace | None]
_NOT_RUN = Entry("not run")


def sweep_grids(sweep: Sweep) -> list[Grid]:
    """Epochs and seconds to the goal, then the final validation loss and metrics.

    Args:
        sweep: The sweep.

    Returns:
        Tables that name themselves.
    """
    grids = []
    if sweep.goal is not None:
        name = f"Epochs / seconds to a {sweep.goal.measure.words} of {sweep.goal.text}"
        grids.append(_grid(sweep, name, _times))
    for measure in measures_of(sweep.metrics):
        words = f"{measure.words} ({sweep.loss_label})" if measure == LOSS else measure.words
        grids.append(_grid(sweep, f"Final {words}", lambda column, measure=measure: _finals(column, measure)))  # type: ignore[misc]
    return grids


def _grid(sweep: Sweep, name: str, fill: Callable[[_Column], list[Entry]]) -> Grid:
    columns = [fill([row.places[place] for row in sweep.rows]) for place in range(len(sweep.sizes))]
    rows = [(Entry(row.label), *(column[place] for column in columns)) for place, row in enumerate(sweep.rows)]
    sizes = [f"batch {size}{' (all)' if size == sweep.whole else ''}" for size in sweep.sizes]
    return Grid(("optimizer", *sizes), tuple(rows), name=name)


def _times(column: _Column) -> list[Entry]:
    """Epochs and seconds; the best has the least seconds among the rows of which most runs reach the goal."""
    reaches = [None if place is None else place.reach for place in column]
    counts = [0 if found is None else found.reached for found in reaches]
    best = _best([None if found is None else found.seconds for found in reaches], counts, higher=False)
    entries = []
    for found, is_best in zip(reaches, best, strict=True):
        if found is None:
            entries.append(_NOT_RUN)
            continue
        shown = "-" if found.epochs is None else f"{found.epochs:g} / {number(found.seconds)}"
        entries.append(Entry(shown, _part(found.reached, found.attempted), is_best))
    return entries


def _finals(column: _Column, measure: Measure) -> list[Entry]:
    """Mean and deviation; the best is the best mean among the rows with the most finished runs."""
    spreads = [None if place is None else place.finals.get(measure.name) for place in column]
    counts = [0 if place is None else place.finished for place in column]
    means = [None if spread is None else spread.mean for spread in spreads]
    show = number if measure == LOSS else metric_text
    entries = []
    for place, spread, is_best in zip(
        column, spreads, _best(means, counts, higher=measure.higher_is_better), strict=True
    ):
        if place is None:
            entries.append(_NOT_RUN)
            continue
        deviation = "" if spread is None or spread.std is None else f"± {number(spread.std, 2)}"
        detail = " ".join(filter(None, (deviation, _part(place.finished, place.attempted))))
        entries.append(Entry("-" if spread is None else show(spread.mean), detail, is_best))
    return entries


def _part(some: int, of: int) -> str:
    return "" if some == of else f"{some} of {of}"


def _best(values: Sequence[float | None], counts: Sequence[int], *, higher: bool) -> list[bool]:
    """Which values are the best of those with the highest count; none where all there are would be."""
    most = max(counts, default=0)
    rivals = [value for value, count in zip(values, counts, strict=True) if value is not None and count == most]
    if not rivals:
        return [False] * len(values)
    top = max(rivals) if higher else min(rivals)
    found = [value == top and count == most for value, count in zip(values, counts, strict=True)]
    # The best of one, or of equals, says nothing.
    return found if sum(found) < sum(value is not None for value in values) else [False] * len(values)
