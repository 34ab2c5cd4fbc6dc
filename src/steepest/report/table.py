"""Summaries to tables on the terminal, to Markdown and to JSON."""

import textwrap
from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from steepest.report.columns import FULL, Value, columns, ending, value_of
from steepest.report.goal import Goal
from steepest.report.summary import OptimizerSummary, TaskSummary
from steepest.report.words import number, times

__all__ = [
    "cells",
    "goal_table",
    "headings",
    "markdown_lines",
    "markdown_table",
    "print_task_table",
    "summary_json",
    "task_table",
]

_UNLIMITED, _FOLDED = 1000, 8


def headings(summary: TaskSummary, *, detail: int = FULL) -> list[str]:
    """Column headings of a task's table.

    Args:
        summary: The task.
        detail: 2 for everything, 1 without standard deviations, 0 for the main columns only.

    Returns:
        Headings, the optimizer's first.
    """
    return ["optimizer", *(column.heading for column in columns(summary, detail)), "finished"]


def cells(summary: TaskSummary, row: OptimizerSummary, *, detail: int = FULL) -> list[tuple[str, bool]]:
    """One row of a task's table.

    Args:
        summary: The task.
        row: One of its rows.
        detail: As in `headings`.

    Returns:
        Text of each cell and whether it is the best of its column.
    """
    values = [value_of(summary, row, column) for column in columns(summary, detail)]
    inside = [(_joined(value) if detail == FULL else value.text, value.best) for value in values]
    return [(row.label, False), *inside, (ending(row), False)]


def _joined(value: Value) -> str:
    return f"{value.text} ± {value.detail}" if value.detail else value.text


def task_table(summary: TaskSummary, *, detail: int = FULL, fold: int = _UNLIMITED) -> Table:
    """Table of one task for the terminal; the best of each column is bold and starred.

    Args:
        summary: The task.
        detail: As in `headings`.
        fold: Most characters on a line of a heading, unless a word is longer.

    Returns:
        A rich table; no text in it is read as markup.
    """
    table = Table(box=box.SIMPLE)
    for place, heading in enumerate(headings(summary, detail=detail)):
        folded = textwrap.fill(heading, fold, break_long_words=False)
        table.add_column(Text(folded), justify="right" if place else "left", no_wrap=True)
    for row in summary.rows:
        first, *middle, last = cells(summary, row, detail=detail)
        table.add_row(
            Text(first[0]),
            *(Text(f"{text} *" if best else f"{text}  ", style="bold green" if best else "") for text, best in middle),
            Text(last[0], style="yellow" if row.problems or row.blow_ups else ""),
        )
    return table


def goal_table(goal: Goal) -> Table:
    """Who reached the goal when, for the terminal.

    Args:
        goal: The goal.

    Returns:
        A rich table; no text in it is read as markup.
    """
    table = Table(box=box.SIMPLE)
    titles = ("to the goal", "reached", "epochs", "seconds", f"of {goal.reference}'s time")
    for place, heading in enumerate(titles):
        table.add_column(Text(heading), justify="right" if place else "left", no_wrap=True)
    for row in goal.rows:
        table.add_row(
            Text(row.label),
            f"{row.reached}/{row.attempted}",
            "-" if row.epochs is None else f"{row.epochs:g}",
            number(row.seconds),
            "-" if row.ratio is None else f"{times(row.ratio)} x",
        )
    return table


def print_task_table(console: Console, summary: TaskSummary, *, title: str, caption: str = "") -> None:
    """Print a table with as much detail as the width of the terminal allows, and the times to the goal.

    Args:
        console: Where to; files and pipes get everything.
        summary: The task.
        title: Line above.
        caption: Line below.
    """
    unlimited = Console(width=_UNLIMITED)
    # As little detail as there is, and headings on several lines, are the last resort.
    for detail, fold in ((2, _UNLIMITED), (1, _UNLIMITED), (0, _UNLIMITED), (0, _FOLDED)):
        table = task_table(summary, detail=detail, fold=fold)
        width = unlimited.measure(table).maximum
        if width <= console.width or not console.is_terminal:
            break
    if not console.is_terminal:
        # A pipe has no width of its own, and rich assumes 80 columns for it.
        console = Console(file=console.file, width=_UNLIMITED)
    console.print(Text(title, style="bold"))
    console.print(table)
    if caption:
        console.print(Text(caption, style="dim"))
    if summary.goal is not None:
        console.print(Text(_goal_line(summary.goal), style="dim"))
        console.print(goal_table(summary.goal))


def _goal_line(goal: Goal) -> str:
    return (
        f"Goal: {goal.measure.words} {goal.text}, {goal.origin}. Medians over the runs that reach it, to within one "
        "epoch."
    )


def markdown_table(summary: TaskSummary) -> str:
    """Table of one task in Markdown.

    Args:
        summary: The task.

    Returns:
        Lines of text; the best of each column is bold.
    """
    names = headings(summary)
    return markdown_lines(names, [cells(summary, row) for row in summary.rows])


def markdown_lines(names: Sequence[str], rows: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Any table in Markdown.

    Args:
        names: Headings.
        rows: Text of each cell and whether it is the best of its column.

    Returns:
        Lines of text; the best of each column is bold.
    """
    lines = [_markdown_line(names), f"|{'---|' * len(names)}"]
    lines += [_markdown_line([f"**{text}**" if best else text for text, best in row]) for row in rows]
    return "\n".join(lines)


def _markdown_line(texts: Sequence[str]) -> str:
    escaped = [text.replace("|", "\\|") for text in texts]
    return f"| {' | '.join(escaped)} |"


def summary_json(summaries: Sequence[TaskSummary]) -> list[dict[str, object]]:
    """Summaries as JSON can hold them.

    Args:
        summaries: One per task and conditions.

    Returns:
        One mapping per summary.
    """
    return [asdict(summary) for summary in summaries]
