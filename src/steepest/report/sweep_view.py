"""The section of a report about batch sizes, ready for the template."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

from steepest.report.charts import Charts, Figure
from steepest.report.goal import Reach
from steepest.report.grids import Grid
from steepest.report.inside import PROJECTION
from steepest.report.plot import MOST_COLOURED
from steepest.report.sweep import Sweep
from steepest.report.sweep_charts import charts_of, sweep_figure, sweep_series
from steepest.report.sweep_grids import sweep_grids
from steepest.report.view import Chip, chips
from steepest.report.words import listing

__all__ = ["SweepSection", "goal_sentence", "sweep_section"]


@dataclass(frozen=True)
class SweepSection:
    """All batch sizes of one problem, as a part of the page."""

    anchor: str
    title: str
    description: str
    goal: str
    verdict: tuple[str, ...]
    legend: tuple[Chip, ...]
    figures: tuple[Figure, ...]
    figure_note: str
    tables: tuple[Grid, ...]
    table_note: str


def sweep_section(sweep: Sweep, place: int, charts: Charts) -> SweepSection:
    """Say everything about the batch sizes of one problem.

    Args:
        sweep: The sweep.
        place: Number of the section among its kind, from 1.
        charts: Draws the figures.

    Returns:
        The section.
    """
    drawn = charts_of(sweep)
    series = sweep_series(sweep, lambda _place: None)
    return SweepSection(
        anchor=f"batch-sizes-{place}",
        title=f"{sweep.task} ({sweep.variant})" if sweep.variant else sweep.task,
        description=f"The same problem and the same conditions at batch size {_sizes(sweep)}.",
        goal=goal_sentence(sweep),
        verdict=_verdict(sweep),
        legend=chips(series, charts) if len(series) > 1 else (),
        figures=tuple(sweep_figure(charts, sweep, chart) for chart in drawn),
        figure_note=_figure_note(sweep, {chart.key for chart in drawn}),
        tables=tuple(sweep_grids(sweep)),
        table_note=_table_note(sweep),
    )


def _sizes(sweep: Sweep) -> str:
    return listing([f"{size}{', the whole training split' if size == sweep.whole else ''}" for size in sweep.sizes])


def goal_sentence(sweep: Sweep) -> str:
    """What is to be reached, and where that comes from.

    Args:
        sweep: The sweep.

    Returns:
        A sentence.
    """
    if sweep.goal is None:
        return "There is no goal: none was given, and no run finished."
    said = f"The goal at all batch sizes is a {sweep.goal.measure.words} of {sweep.goal.text}: {sweep.goal.origin}."
    return said if sweep.goal.given else f"{said} Each batch size by itself has a goal of its own."


def _verdict(sweep: Sweep) -> tuple[str, ...]:
    """Who is first at every batch size, among the rows of which most runs reach the goal."""
    if sweep.goal is None:
        return ()
    words = f"a {sweep.goal.measure.words} of {sweep.goal.text}"
    columns = [
        [place.reach for row in sweep.rows if (place := row.places[at]) is not None and place.reach is not None]
        for at in range(len(sweep.sizes))
    ]
    every = [found for column in columns for found in column if found.reached]
    if not every:
        return (f"No run reaches {words}.",)
    if not any(found.seconds for found in every):
        return (f"The untrained model has {words} already: such a goal says nothing.",)
    epochs, seconds = (_winners(sweep, columns, key) for key in ("epochs", "seconds"))
    return (f"Fewest epochs to {words}: {epochs}.", f"Fewest seconds: {seconds}.")


def _winners(sweep: Sweep, columns: Sequence[Sequence[Reach]], key: str) -> str:
    names = [_first(column, key) for column in columns]
    if len(sweep.rows) > 1 and len(set(names)) == 1:
        return f"{names[0]} at every batch size"
    runs = groupby(zip(names, map(str, sweep.sizes), strict=True), key=itemgetter(0))
    return "; ".join(f"{name} at {listing([size for _, size in run])}" for name, run in runs)


def _first(column: Sequence[Reach], key: str) -> str:
    most = max((found.reached for found in column), default=0)
    if not most:
        return "nobody"
    rivals = {found.label: getattr(found, key) for found in column if found.reached == most}
    return listing([label for label, value in rivals.items() if value == min(rivals.values())])


def _figure_note(sweep: Sweep, drawn: set[str]) -> str:
    parts = []
    if drawn & {"epochs", "seconds"}:
        parts.append(
            "A marker is the median over the runs that reach the goal: filled where all runs do, hollow where some "
            "do, missing where none does."
        )
    if drawn and len(sweep.rows) > 1:
        parts.append(
            "The markers of one batch size stand side by side, so that equal ones are seen; thin lines lead to names."
        )
    if len(sweep.rows) > MOST_COLOURED:
        parts.append(f"Only the {MOST_COLOURED} with the lowest loss have colours.")
    if "r" in drawn:
        parts.append(f"{PROJECTION} Its markers are medians over epochs and runs.")
    return " ".join(parts)


def _table_note(sweep: Sweep) -> str:
    finals = "Final numbers are means ± standard deviations over the runs that finished."
    if sweep.goal is None:
        return finals
    return (
        "Times are medians over the runs that reach the goal, to within one epoch, with how many do where not all "
        f"reach it; ★ marks the least seconds, among the rows of which most runs do. {finals}"
    )
