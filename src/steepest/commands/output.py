"""What commands print when they are done."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Console

from steepest.errors import InvalidOptionError
from steepest.report.summary import summarise
from steepest.report.table import print_task_table, summary_json
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.records import RunRecord

__all__ = ["goals_by_task", "print_files", "print_tables", "result_json"]

_LEGEND = (
    "Mean ± standard deviation over the finished runs; * is the best of a column. The clock leaves out evaluation, "
    "data loading and warm-up; peak memory is the tensors of a step beyond model and data."
)


def goals_by_task(goal: float | Mapping[str, float] | None, tasks: Iterable[str]) -> dict[str, float]:
    """Give every task its goal.

    Args:
        goal: One loss for all tasks, a loss for each, or None.
        tasks: Names of the tasks.

    Returns:
        Losses by task; tasks that are not in it have the default goal.

    Raises:
        InvalidOptionError: If a goal is no number above 0.
        UnknownNameError: If a goal is for a task that is not there.
    """
    names = list(dict.fromkeys(tasks))
    if goal is None:
        return {}
    goals = dict(goal) if isinstance(goal, Mapping) else dict.fromkeys(names, goal)
    for name, loss in goals.items():
        if name not in names:
            raise UnknownNameError(unknown("task of a goal", name, names))
        if not 0 < loss < float("inf"):
            raise InvalidOptionError(f"the goal is {loss}: it must be a validation loss above 0")
    return goals


def print_tables(console: Console, records: Sequence[RunRecord], goals: Mapping[str, float]) -> None:
    """Print one table per task, and what its columns mean.

    Args:
        console: Where to.
        records: The records.
        goals: Validation losses by task that are timed.
    """
    for summary in summarise(records, goals):
        name = f"{summary.task} ({summary.variant})" if summary.variant else summary.task
        sources = dict.fromkeys(part for row in summary.rows for part in row.options_source.split("; "))
        console.print()
        for note in summary.notes:
            console.print(note, soft_wrap=True)
        print_task_table(console, summary, title=f"{name} - {summary.description}", caption="; ".join(sources))
    console.print(_LEGEND, soft_wrap=True)


def print_files(console: Console, files: Mapping[str, Path]) -> None:
    """Print where things are.

    Args:
        console: Where to.
        files: Paths by what they are.
    """
    width = max(map(len, files))
    console.print()
    for what, path in files.items():
        console.print(f"{what:<{width}}  {path}", soft_wrap=True)


def result_json(records: Sequence[RunRecord], goals: Mapping[str, float], files: Mapping[str, object]) -> str:
    """The result of a command for programs.

    Args:
        records: The records.
        goals: Validation losses by task that are timed.
        files: What was written.

    Returns:
        JSON.
    """
    return json.dumps({"schema": 2, "tasks": summary_json(summarise(records, goals)), "files": files}, default=str)
