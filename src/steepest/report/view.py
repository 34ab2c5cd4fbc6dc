"""Everything a report says, ready for the template."""

from collections.abc import Sequence
from dataclasses import dataclass

from steepest.report.charts import Charts, Figure
from steepest.report.curves import Series, series_of
from steepest.report.grids import Grid, common_source, goal_grid, options_grid, result_grid, unfinished_grid
from steepest.report.groups import Cell
from steepest.report.inside import Inside, inside
from steepest.report.plot import MOST_COLOURED
from steepest.report.subsets import SELECTION_NOTE, subset_grid
from steepest.report.summary import TaskSummary
from steepest.report.verdict import verdict
from steepest.report.words import count, listing, number

__all__ = ["Chip", "Section", "chips", "section"]


@dataclass(frozen=True)
class Chip:
    """An entry of the legend; the number of its colour is None for all that is drawn in grey."""

    label: str
    colour: int | None
    dashes: str


@dataclass(frozen=True)
class Section:
    """Runs that may be compared, as a part of the page."""

    anchor: str
    title: str
    variant: str
    description: str
    notes: tuple[str, ...]
    verdict: tuple[str, ...]
    legend: tuple[Chip, ...]
    figures: tuple[Figure, ...]
    figure_note: str
    results: Grid
    goal: Grid | None
    goal_note: str
    inside: Inside | None
    selections: Grid | None
    selection_note: str
    unfinished: Grid | None
    settings: tuple[tuple[str, str], ...]
    options_note: str
    options: Grid


def section(cell: Cell, summary: TaskSummary, place: int, charts: Charts) -> Section:
    """Say everything about runs that may be compared.

    Args:
        cell: The runs.
        summary: Their summary.
        place: Number of the section, from 1.
        charts: Draws the figures.

    Returns:
        The section.
    """
    goal = summary.goal
    figures, selections = tuple(charts.curves(cell, goal)), subset_grid(cell)
    return Section(
        anchor=f"section-{place}",
        title=cell.task,
        variant=cell.variant,
        description=summary.description,
        notes=summary.notes,
        verdict=tuple(verdict(summary)),
        legend=_legend(cell, charts),
        figures=figures,
        figure_note=_figure_note(cell, has_goal=goal is not None),
        results=result_grid(summary),
        goal=None if goal is None else goal_grid(goal),
        goal_note=_goal_note(summary),
        inside=inside(cell, charts),
        selections=selections,
        selection_note=SELECTION_NOTE if selections is not None else "",
        unfinished=unfinished_grid(cell),
        settings=_settings(cell),
        options_note=_options_note(summary),
        options=options_grid(cell, summary),
    )


def _legend(cell: Cell, charts: Charts) -> tuple[Chip, ...]:
    series = series_of(cell)
    return () if len(series) == 1 and not series[0].lost else chips(series, charts)


def chips(series: Sequence[Series], charts: Charts) -> tuple[Chip, ...]:
    """The legend of some lines.

    Args:
        series: What was drawn.
        charts: What it was drawn by.

    Returns:
        One entry per coloured line, and one for all others.
    """
    coloured = [
        Chip(item.label, charts.paint.place(item.look), " ".join(f"{1.6 * part:g}" for part in item.look.dashes))
        for item in series
        if item.rank < MOST_COLOURED
    ]
    grey = len(series) - len(coloured)
    return (*coloured, *([Chip(count(grey, "other"), None, "")] if grey else []))


def _figure_note(cell: Cell, *, has_goal: bool) -> str:
    several = any(len(row.finished) > 1 for row in cell.rows)
    parts = ["lines are medians over the seeds, bands reach from the lowest to the highest"] if several else []
    if any(row.unfinished and any(run.history for run in row.unfinished) for row in cell.rows):
        parts.append("a dotted line with a cross is a run that did not finish")
    if has_goal:
        parts.append("the dashed grey line is the goal")
    if len(cell.rows) > MOST_COLOURED:
        parts.append(f"only the {MOST_COLOURED} with the lowest loss have colours")
    return f"{'; '.join(parts).capitalize()}." if parts else ""


def _goal_note(summary: TaskSummary) -> str:
    goal = summary.goal
    if goal is None:
        return ""
    return (
        f"The goal is a {goal.measure.words} of {goal.text}: {goal.origin}. Epochs and seconds are medians over the "
        f"runs that reach it, at the first evaluation at or {'above' if goal.higher_is_better else 'below'} it. There "
        "is one evaluation per epoch, so they are right to within one epoch."
    )


def _options_note(summary: TaskSummary) -> str:
    source = common_source(summary)
    return f"How the options were chosen: {source}." if source else ""


_SCHEDULES = {
    "linear": "falls linearly to 0",
    "constant": "constant",
    "auto": "falls linearly to 0, constant for solvers that find the lengths of their steps",
}


def _settings(cell: Cell) -> tuple[tuple[str, str], ...]:
    first = cell.records[0]
    sizes = {record.num_parameters for record in cell.records if record.num_parameters is not None}
    samples = next((record.samples for record in cell.records if record.samples is not None), None)
    budget = [count(first.epochs, "epoch")] if first.epochs is not None else []
    budget += [f"{number(first.budget_seconds)} s of training"] if first.budget_seconds is not None else []
    seeds = sorted({record.seed for record in cell.records})
    found = {
        "Model": cell.problem.model or "",
        "Parameters": listing([f"{size:,}" for size in sorted(sizes)]) if sizes else "",
        "Samples": "{:,} training, {:,} validation, {:,} test".format(*samples) if samples else "",
        "Batch": count(first.batch_size, "sample"),
        "Budget of a run": " or ".join(budget) or "none",
        "Learning rate": _SCHEDULES.get(first.schedule, first.schedule),
        "Seeds": ", ".join(map(str, seeds)),
        "Seed of the splits": str(first.data_seed),
        "Loss": cell.problem.loss,
        "Data and code": f"sha256 {cell.problem.digest[:16]}" if cell.problem.digest else "",
    }
    return tuple((name, value) for name, value in found.items() if value)
