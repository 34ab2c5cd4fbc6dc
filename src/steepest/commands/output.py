"""What commands print when they are done."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console

from steepest.errors import InvalidOptionError
from steepest.report.groups import group, label_of
from steepest.report.measure import LOSS, Goals, check_metric
from steepest.report.subsets import SELECTION_NOTE
from steepest.report.summary import TaskSummary, summarise
from steepest.report.sweep import sweeps_of
from steepest.report.sweep_table import print_sweep, sweep_json
from steepest.report.table import print_task_table, summary_json
from steepest.report.words import listing
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.records import RunRecord

__all__ = ["goals_for", "print_files", "print_tables", "result_json"]

_LEGEND = (
    "Mean ± standard deviation over the finished runs; * is the best of a column. The clock leaves out evaluation, "
    "data loading and warm-up; peak memory is the tensors of a step beyond model and data."
)


def goals_for(
    goal: float | Mapping[str, float] | None, metric: str | None, metrics: Mapping[str, Sequence[str]]
) -> Goals:
    """Give every task its goal.

    Args:
        goal: One value for all tasks, a value for each, or None.
        metric: What it is a value of: a metric of every task, or None for the validation loss.
        metrics: Names of the metrics of every task.

    Returns:
        What is timed; tasks without a value have the default goal.

    Raises:
        InvalidOptionError: If a goal is no possible value.
        UnknownNameError: If a goal is for a task that is not there, or a task lacks the metric.
    """
    for task, known in metrics.items():
        check_metric(task, metric, known)
    if goal is None:
        return Goals(metric=metric)
    values = dict(goal) if isinstance(goal, Mapping) else dict.fromkeys(metrics, goal)
    for task, value in values.items():
        if task not in metrics:
            raise UnknownNameError(unknown("task of a goal", task, metrics))
        if metric in {None, LOSS.name} and not 0 < value < math.inf:
            raise InvalidOptionError(f"the goal is {value}: it must be a validation loss above 0")
        if not math.isfinite(value):
            raise InvalidOptionError(f"the goal is {value}: it must be a finite value of {metric}")
    return Goals(values, metric)


def print_tables(console: Console, records: Sequence[RunRecord], goals: Goals) -> None:
    """Print one table per task, what its columns mean, and the tables across batch sizes.

    Args:
        console: Where to.
        records: The records.
        goals: What is timed.
    """
    for summary in summarise(records, goals):
        name = f"{summary.task} ({summary.variant})" if summary.variant else summary.task
        console.print()
        for note in summary.notes:
            console.print(note, soft_wrap=True)
        print_task_table(console, summary, title=f"{name} - {summary.description}", caption=_sources(summary))
    console.print(_LEGEND, soft_wrap=True)
    if any(record.select is not None for record in records):
        console.print(SELECTION_NOTE, soft_wrap=True)
    for sweep in sweeps_of(group(records), goals):
        console.print()
        print_sweep(console, sweep)


def _sources(summary: TaskSummary) -> str:
    """How options were chosen: one sentence, or a line for each that is true of some optimizers only."""
    pairs = {(row.optimizer, row.options_source) for row in summary.rows}
    several = {name for name, _ in pairs if sum(other == name for other, _ in pairs) > 1}
    owners: dict[str, list[str]] = {}
    for row in summary.rows:
        name = row.label if row.optimizer in several else label_of(row.optimizer)
        owners.setdefault(row.options_source, []).append(name)
    if len(owners) == 1:
        return next(iter(owners))
    return "\n".join(f"{listing(list(dict.fromkeys(names)))}: {source}" for source, names in owners.items())


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


def result_json(records: Sequence[RunRecord], goals: Goals, files: Mapping[str, object]) -> str:
    """The result of a command for programs.

    Args:
        records: The records.
        goals: What is timed.
        files: What was written.

    Returns:
        JSON.
    """
    summaries, sweeps = summarise(records, goals), sweeps_of(group(records), goals)
    content = {"schema": 2, "tasks": summary_json(summaries), "sweeps": sweep_json(sweeps), "files": files}
    return json.dumps(content, default=str)
