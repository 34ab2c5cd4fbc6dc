"""Records to one row per optimizer, options and selection: mean, standard deviation and range over the seeds."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from steepest.report.goal import Goal, goal_of
from steepest.report.groups import Cell, Row, group
from steepest.report.measure import Goals, measure_of
from steepest.training.blow_ups import blow_up
from steepest.training.records import MetricNote, RunRecord

__all__ = [
    "OptimizerSummary",
    "Spread",
    "TaskSummary",
    "best_rows",
    "metric_key",
    "spread_of",
    "summarise",
    "summarise_cell",
]


@dataclass(frozen=True)
class Spread:
    """A number over the finished runs: mean, sample standard deviation, smallest and largest value."""

    mean: float
    std: float | None
    count: int
    low: float
    high: float


@dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer with one set of options on one task.

    Attributes:
        optimizer: Name of the optimizer.
        label: Name for people.
        select: What was selected to train on, None for everything.
        finished: Runs that finished.
        attempted: Runs that were made.
        problems: How the other runs ended, as "diverged" or "failed".
        blow_ups: Finished runs whose validation loss blew up on the way, see `blow_up`.
        numbers: Spread of each number over the finished runs; a number nobody has is absent.
        options: Options of its runs, as JSON.
        options_source: How they were chosen.
    """

    optimizer: str
    label: str
    select: str | None
    finished: int
    attempted: int
    problems: tuple[str, ...]
    blow_ups: int
    numbers: dict[str, Spread]
    options: Mapping[str, object]
    options_source: str


@dataclass(frozen=True)
class TaskSummary:
    """All rows that may be compared on one task.

    Attributes:
        task: Name of the task.
        variant: What tells this one from other summaries of the task, empty if it is the only one.
        stem: Name of its files.
        description: One line about data and model.
        notes: What was inferred about the data.
        metric: Key of the main metric, None if the task has none.
        metric_label: Heading of the main metric.
        metric_higher: Whether higher is better.
        metrics: All metrics, the main one first.
        loss_label: Name of the loss.
        rows: In the order of the comparison.
        goal: Who reached which value when, None if there was nothing to compare.
    """

    task: str
    variant: str
    stem: str
    description: str
    notes: tuple[str, ...]
    metric: str | None
    metric_label: str
    metric_higher: bool
    metrics: tuple[MetricNote, ...]
    loss_label: str
    rows: tuple[OptimizerSummary, ...]
    goal: Goal | None


_NUMBERS: Mapping[str, Callable[[RunRecord], float | None]] = {
    "val_loss": lambda record: record.final.val_loss if record.final else None,
    "test_loss": lambda record: record.final.test_loss if record.final else None,
    "seconds": lambda record: record.seconds,
    "ms_per_step": lambda record: 1e3 * (record.seconds - _selecting(record)) / record.steps if record.steps else None,
    "steps": lambda record: record.steps,
    "peak_memory": lambda record: record.peak_memory,
    "kept": lambda record: _kept(record),
    "selecting": lambda record: _selecting(record) if record.select else None,
}


def _selecting(record: RunRecord) -> float:
    return sum(item.seconds for item in record.selections)


def _kept(record: RunRecord) -> float | None:
    """Samples that the run ended on."""
    if record.select is not None:
        return record.selections[-1].kept if record.selections else None
    return record.samples[0] if record.samples else None


def metric_key(place: int, metric: MetricNote) -> str:
    """Key of a metric on the test split among the numbers of a row.

    Args:
        place: Its place among the task's metrics; the first is the main one.
        metric: The metric.

    Returns:
        The key.
    """
    return f"metric_{metric.name}" if place else "metric"


def summarise(records: Sequence[RunRecord], goals: Goals | None = None) -> list[TaskSummary]:
    """Put records that may be compared beside each other.

    Args:
        records: Records of one comparison or of several.
        goals: What is timed; None for the default goals.

    Returns:
        One summary per problem and conditions, in the order of the records.
    """
    return [summarise_cell(cell, goals) for cell in group(records)]


def summarise_cell(cell: Cell, goals: Goals | None = None) -> TaskSummary:
    """Summarise records that may be compared.

    Args:
        cell: The records.
        goals: What is timed; None for the default goals.

    Returns:
        The summary.
    """
    metric = next(iter(cell.problem.metrics), None)
    goals = goals or Goals()
    return TaskSummary(
        task=cell.task,
        variant=cell.variant,
        stem=cell.stem,
        description=cell.problem.description,
        notes=cell.problem.notes,
        metric=metric.name if metric else None,
        metric_label=metric.label if metric else "",
        metric_higher=metric.higher_is_better if metric else True,
        metrics=cell.problem.metrics,
        loss_label=cell.problem.loss,
        rows=tuple(_summarise_row(row, cell.problem.metrics) for row in cell.rows),
        goal=goal_of(cell, goals.values.get(cell.task), measure_of(cell.problem, goals.metric)),
    )


def _summarise_row(row: Row, metrics: Sequence[MetricNote]) -> OptimizerSummary:
    numbers = {name: spread_of([read(record) for record in row.finished]) for name, read in _NUMBERS.items()}
    for place, metric in enumerate(metrics):
        numbers[metric_key(place, metric)] = spread_of([
            record.final.test_metrics.get(metric.name) if record.final else None for record in row.finished
        ])
    return OptimizerSummary(
        optimizer=row.optimizer,
        label=row.label,
        select=row.select,
        finished=len(row.finished),
        attempted=len(row.records),
        problems=tuple(record.status for record in row.unfinished),
        blow_ups=sum(blow_up(record.history) is not None for record in row.finished),
        numbers={key: spread for key, spread in numbers.items() if spread is not None},
        options=row.options,
        options_source="; or: ".join(dict.fromkeys(record.options_source for record in row.records)),
    )


def spread_of(values: Sequence[float | None]) -> Spread | None:
    """Mean, deviation and range of what is there and finite.

    Args:
        values: The values.

    Returns:
        The spread, or None if nothing is there.
    """
    present = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not present:
        return None
    std = stdev(present) if len(present) > 1 else None
    return Spread(fmean(present), std, len(present), min(present), max(present))


def best_rows(summary: TaskSummary, number: str, *, higher: bool = False) -> list[OptimizerSummary]:
    """Rows with the best mean of a number.

    Only those with the most finished runs compete: a mean over fewer seeds leaves out the bad ones.

    Args:
        summary: A task.
        number: Key of the number.
        higher: Whether higher is better.

    Returns:
        The rows, more than one where means are equal, none where nothing finished.
    """
    most = max((row.finished for row in summary.rows), default=0)
    rivals = [row for row in summary.rows if row.finished == most and number in row.numbers]
    means = [row.numbers[number].mean for row in rivals]
    if not means:
        return []
    best = max(means) if higher else min(means)
    return [row for row, mean in zip(rivals, means, strict=True) if mean == best]
