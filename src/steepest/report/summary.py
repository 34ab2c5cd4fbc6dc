"""Records to one row per optimizer: mean and standard deviation over the seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, stdev

from steepest.training.records import RunRecord
from steepest.training.registry import optimizers, tasks

__all__ = ["OptimizerSummary", "Spread", "TaskSummary", "best_rows", "summarise"]


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of a number over the finished runs."""

    mean: float
    std: float | None
    count: int


@dataclass(frozen=True)
class OptimizerSummary:
    """One optimizer on one task.

    Attributes:
        optimizer: Registry name.
        label: Name for people.
        finished: Runs that finished.
        attempted: Runs that were made.
        problems: How the other runs ended, as "diverged" or "failed".
        numbers: Spread of each number over the finished runs; a number nobody has is absent.
        options: Options of its runs, as JSON.
    """

    optimizer: str
    label: str
    finished: int
    attempted: int
    problems: tuple[str, ...]
    numbers: dict[str, Spread]
    options: dict[str, object]


@dataclass(frozen=True)
class TaskSummary:
    """All optimizers on one task.

    Attributes:
        task: Registry name.
        metric: Key of the main metric.
        metric_label: Heading of the main metric.
        metric_higher: Whether higher is better.
        loss_label: Name of the loss.
        rows: One per optimizer, in the order of the comparison.
    """

    task: str
    metric: str
    metric_label: str
    metric_higher: bool
    loss_label: str
    rows: tuple[OptimizerSummary, ...]


_NUMBERS: dict[str, Callable[[RunRecord], float | None]] = {
    "val_loss": lambda record: record.final.val_loss if record.final else None,
    "test_loss": lambda record: record.final.test_loss if record.final else None,
    "seconds": lambda record: record.seconds,
    "ms_per_step": lambda record: 1e3 * record.seconds / record.steps if record.steps else None,
    "steps": lambda record: record.steps,
    "peak_memory": lambda record: record.peak_memory,
}


def summarise(records: Sequence[RunRecord]) -> list[TaskSummary]:
    """Group records by task and optimizer.

    Args:
        records: Records of one comparison.

    Returns:
        One summary per task, in the order of the records.
    """
    names = list(dict.fromkeys(record.task for record in records))
    return [_summarise_task(name, [record for record in records if record.task == name]) for name in names]


def _summarise_task(name: str, records: Sequence[RunRecord]) -> TaskSummary:
    task = tasks()[name]
    metric = task.metrics[0]
    chosen = list(dict.fromkeys(record.optimizer for record in records))
    rows = [
        _summarise_optimizer([record for record in records if record.optimizer == optimizer], metric.name)
        for optimizer in chosen
    ]
    return TaskSummary(name, metric.name, metric.label, metric.higher_is_better, task.loss.name, tuple(rows))


def _summarise_optimizer(records: Sequence[RunRecord], metric: str) -> OptimizerSummary:
    finished = [record for record in records if record.status == "finished"]
    numbers = {name: _spread([read(record) for record in finished]) for name, read in _NUMBERS.items()}
    numbers["metric"] = _spread([
        record.final.test_metrics.get(metric) if record.final else None for record in finished
    ])
    name = records[0].optimizer
    return OptimizerSummary(
        optimizer=name,
        label=optimizers()[name].label,
        finished=len(finished),
        attempted=len(records),
        problems=tuple(record.status for record in records if record.status != "finished"),
        numbers={key: spread for key, spread in numbers.items() if spread is not None},
        options=records[0].options,
    )


def _spread(values: Sequence[float | None]) -> Spread | None:
    present = [float(value) for value in values if value is not None and math.isfinite(value)]
    if not present:
        return None
    return Spread(fmean(present), stdev(present) if len(present) > 1 else None, len(present))


def best_rows(summary: TaskSummary, number: str, *, higher: bool = False) -> set[str]:
    """Optimizers with the best mean of a number.

    Only those with the most finished runs compete: a mean over fewer seeds leaves out the bad ones.

    Args:
        summary: A task.
        number: Key of the number.
        higher: Whether higher is better.

    Returns:
        Registry names, more than one where means are equal, none where nothing finished.
    """
    most = max((row.finished for row in summary.rows), default=0)
    means = {
        row.optimizer: row.numbers[number].mean
        for row in summary.rows
        if row.finished == most and number in row.numbers
    }
    if not means:
        return set()
    best = max(means.values()) if higher else min(means.values())
    return {name for name, mean in means.items() if mean == best}


def median_or_none(values: Sequence[float | None]) -> float | None:
    """Median of the numbers that are there.

    Args:
        values: Numbers and Nones.

    Returns:
        The median, or None if there is no number.
    """
    present = [value for value in values if value is not None]
    return median(present) if present else None
