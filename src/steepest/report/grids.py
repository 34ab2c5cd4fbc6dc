"""The tables of the report, as the template shows them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from steepest.report.columns import columns, ending, value_of
from steepest.report.goal import Goal
from steepest.report.groups import Cell
from steepest.report.summary import TaskSummary, best_rows
from steepest.report.words import number, options_text, times
from steepest.training.records import RunRecord

__all__ = [
    "Entry",
    "Grid",
    "common_source",
    "environment_grid",
    "goal_grid",
    "options_grid",
    "overview_grid",
    "result_grid",
    "unfinished_grid",
]


_EMPTY = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class Entry:
    """One place of a table.

    Attributes:
        text: What it says.
        detail: Said with less weight behind it.
        best: Whether it is the best of its column.
        link: Place on the page that it leads to.
    """

    text: str
    detail: str = ""
    best: bool = False
    link: str = ""


@dataclass(frozen=True)
class Grid:
    """A table.

    Attributes:
        headings: Words above the columns.
        rows: Entries, the row's name first.
        words: Columns that hold words and not numbers, by their place.
        name: What the table is, for readers who do not see it.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[Entry, ...], ...]
    words: frozenset[int] = field(default=frozenset({0}))
    name: str = ""


def overview_grid(summaries: Sequence[TaskSummary], titles: Sequence[str]) -> Grid:
    """The winners of all sections.

    Args:
        summaries: One per section.
        titles: Their titles; section N is the place `section-N`.

    Returns:
        The table.
    """
    rows = []
    for place, (summary, title) in enumerate(zip(summaries, titles, strict=True), start=1):
        best = best_rows(summary, "val_loss")
        metric = next((column for column in columns(summary) if column.key == "metric"), None)
        shown = value_of(summary, best[0], metric).text if best and metric else "-"
        rows.append((
            Entry(title, link=f"#section-{place}"),
            Entry(", ".join(row.label for row in best) or "no run finished"),
            Entry(number(best[0].numbers["val_loss"].mean) if best else "-"),
            Entry(shown, f"{summary.metric_label}" if shown != "-" else ""),
            Entry(_fastest(summary.goal)),
            Entry(f"{sum(row.finished for row in summary.rows)}/{sum(row.attempted for row in summary.rows)}"),
        ))
    titles_ = ("problem", "lowest val loss", "val loss", "its test metric", "first to the goal", "finished")
    return Grid(titles_, tuple(rows), frozenset({0, 1, 4}), "Overview")


def _fastest(goal: Goal | None) -> str:
    if goal is None or not any(row.reached for row in goal.rows):
        return "-"
    most = max(row.reached for row in goal.rows)
    first = min((row for row in goal.rows if row.reached == most), key=lambda row: row.seconds or 0.0)
    return f"{first.label}, {number(first.seconds)} s"


def result_grid(summary: TaskSummary) -> Grid:
    """The final numbers.

    Args:
        summary: The task.

    Returns:
        The table.
    """
    shown = columns(summary)
    table = [[value_of(summary, row, column) for column in shown] for row in summary.rows]
    # Where one row of a column has a deviation all leave room for it: the means then stand below each other.
    roomy = [any(value.detail for value in column) for column in zip(*table, strict=True)]
    rows = []
    for row, values in zip(summary.rows, table, strict=True):
        entries = [
            Entry(value.text, f"± {value.detail}" if value.detail else _EMPTY * room, value.best)
            for value, room in zip(values, roomy, strict=True)
        ]
        done, _, problems = ending(row).partition(" ")
        rows.append((Entry(row.label), *entries, Entry(done, problems)))
    return Grid(("optimizer", *(column.heading for column in shown), "finished"), tuple(rows), name="Final numbers")


def goal_grid(goal: Goal) -> Grid:
    """Who reached the goal when.

    Args:
        goal: The goal.

    Returns:
        The table.
    """
    ranges = [_range(row.fastest, row.slowest) for row in goal.rows]
    rows = [
        (
            Entry(row.label),
            Entry(f"{row.reached}/{row.attempted}"),
            Entry("-" if row.epochs is None else f"{row.epochs:g}"),
            Entry(number(row.seconds)),
            *([Entry(ends or "-")] if any(ranges) else []),
            Entry("-" if row.ratio is None else f"{times(row.ratio)} ×"),
        )
        for row, ends in zip(goal.rows, ranges, strict=True)
    ]
    between = ["range of seconds"] if any(ranges) else []
    titles = ("optimizer", "reached", "epochs", "seconds", *between, f"relative to {goal.reference}")
    return Grid(titles, tuple(rows), name="Time to goal")


def _range(low: float | None, high: float | None) -> str:
    """Both ends, empty where they look the same."""
    if low is None or high is None or number(low) == number(high):
        return ""
    return f"{number(low)} to {number(high)}"


def unfinished_grid(cell: Cell) -> Grid | None:
    """The runs that did not finish.

    Args:
        cell: Runs that may be compared.

    Returns:
        The table, or None if all finished.
    """
    rows = [
        (
            Entry(row.label),
            Entry(str(record.seed)),
            Entry(record.status.replace("_", " ")),
            Entry(_last_epoch(record)),
            Entry(record.error or "no reason was recorded"),
        )
        for row in cell.rows
        for record in row.unfinished
    ]
    titles = ("optimizer", "seed", "status", "last epoch", "what went wrong")
    return Grid(titles, tuple(rows), frozenset({0, 2, 4}), "Runs that did not finish") if rows else None


def _last_epoch(record: RunRecord) -> str:
    return str(record.history[-1].epoch) if record.history else "-"


def options_grid(cell: Cell, summary: TaskSummary) -> Grid:
    """Options of every row and, unless it is the same for all, how they were chosen.

    Args:
        cell: Runs that may be compared.
        summary: Their summary.

    Returns:
        The table.
    """
    same = common_source(summary)
    rows = [
        (
            Entry(row.label),
            Entry(options_text(row.options)),
            *([] if same else [Entry(row.options_source)]),
            Entry(", ".join(str(record.seed) for record in runs.records)),
        )
        for row, runs in zip(summary.rows, cell.rows, strict=True)
    ]
    titles = ("optimizer", "options", *([] if same else ["how they were chosen"]), "seeds")
    return Grid(titles, tuple(rows), frozenset(range(4)), "Options")


def common_source(summary: TaskSummary) -> str:
    """How the options of all rows were chosen.

    Args:
        summary: The task.

    Returns:
        The words, empty where the rows differ.
    """
    sources = {row.options_source for row in summary.rows}
    return sources.pop() if len(sources) == 1 else ""


def environment_grid(environments: Sequence[Mapping[str, str | int | None]]) -> Grid:
    """Where the runs were made; values that differ are listed with how many runs had them.

    Args:
        environments: One per record.

    Returns:
        The table.
    """
    names = list(dict.fromkeys(name for environment in environments for name in environment))
    rows = []
    for name in names:
        values = ["-" if environment.get(name) is None else str(environment[name]) for environment in environments]
        different = list(dict.fromkeys(values))
        shown = different[0] if len(different) == 1 else "; ".join(f"{v} ({values.count(v)} runs)" for v in different)
        rows.append((Entry(name), Entry(shown)))
    return Grid(("", "value"), tuple(rows), frozenset({0, 1}), "Environment")
