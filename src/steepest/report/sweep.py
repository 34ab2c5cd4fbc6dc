"""A large-batch study in numbers: every optimizer at every batch size, to one and the same goal."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from steepest.report.goal import Reach, Target, default_goal, origin_of, reach
from steepest.report.groups import Cell, Row, Study, studies
from steepest.report.measure import LOSS, Goals, Measure, measure_of
from steepest.report.summary import Spread, spread_of
from steepest.training.records import MetricNote

__all__ = ["Sweep", "SweepGoal", "SweepPlace", "SweepRow", "measures_of", "sweep_of", "sweeps_of"]


@dataclass(frozen=True)
class SweepPlace:
    """One optimizer at one batch size.

    Attributes:
        finished: Runs that finished.
        attempted: Runs that were made.
        reach: How they got to the goal, None if there is none.
        finals: Validation loss and metrics of the finished runs at the end of training, by name.
        r: Median over runs and epochs of the r that FOP measures, None for optimizers that do not tell it.
    """

    finished: int
    attempted: int
    reach: Reach | None
    finals: dict[str, Spread]
    r: float | None


@dataclass(frozen=True)
class SweepRow:
    """One optimizer at all batch sizes; None where it was not run."""

    optimizer: str
    label: str
    places: tuple[SweepPlace | None, ...]


@dataclass(frozen=True)
class SweepGoal(Target):
    """The value to be reached, the same at all batch sizes.

    Attributes:
        given: Whether the user gave it.
        origin: Where it comes from.
    """

    given: bool
    origin: str


@dataclass(frozen=True)
class Sweep:
    """All batch sizes of one problem.

    Attributes:
        task: Name of the task.
        variant: What tells this one from other sweeps of the task, empty if it is the only one.
        stem: Name of its files.
        sizes: The batch sizes, rising.
        whole: Samples of the whole training split, None if unknown.
        loss_label: Name of the loss.
        metrics: The task's metrics.
        goal: What is to be reached, None if no run finished and none was given.
        rows: In the order of the records.
    """

    task: str
    variant: str
    stem: str
    sizes: tuple[int, ...]
    whole: int | None
    loss_label: str
    metrics: tuple[MetricNote, ...]
    goal: SweepGoal | None
    rows: tuple[SweepRow, ...]


def sweeps_of(cells: Sequence[Cell], goals: Goals | None = None) -> list[Sweep]:
    """Summarise every study of batch sizes.

    Args:
        cells: Cells of one comparison or of several.
        goals: What is timed; None for the default goals.

    Returns:
        One sweep per study, none where every problem has one batch size.
    """
    return [sweep_of(study, goals or Goals()) for study in studies(cells)]


def sweep_of(study: Study, goals: Goals) -> Sweep:
    """Summarise a study of batch sizes.

    Args:
        study: Its cells.
        goals: What is timed.

    Returns:
        The sweep.
    """
    problem, cells = study.cells[0].problem, study.cells
    goal = _goal(study, goals.values.get(study.task), measure_of(problem, goals.metric))
    measures = measures_of(problem.metrics)
    labels = {row.label: row.optimizer for cell in cells for row in cell.rows}
    rows = []
    for label, optimizer in labels.items():
        found = [next((row for row in cell.rows if row.label == label), None) for cell in cells]
        places = tuple(None if row is None else _place(row, goal, measures) for row in found)
        rows.append(SweepRow(optimizer, label, places))
    samples = next((record.samples for cell in cells for record in cell.records if record.samples is not None), None)
    return Sweep(
        task=study.task,
        variant=study.variant,
        stem=study.stem,
        sizes=study.sizes,
        whole=samples[0] if samples else None,
        loss_label=problem.loss,
        metrics=problem.metrics,
        goal=goal,
        rows=tuple(rows),
    )


def measures_of(metrics: Sequence[MetricNote]) -> list[Measure]:
    """What is known of a final model.

    Args:
        metrics: The task's metrics.

    Returns:
        The validation loss and the metrics.
    """
    return [LOSS, *(Measure(metric.name, metric.label, metric.higher_is_better) for metric in metrics)]


def _goal(study: Study, given: float | None, measure: Measure) -> SweepGoal | None:
    """The given goal, else the default one of the smallest batch size at which a run finished."""
    value, origin = given, "given by the user"
    if value is None:
        found = ((size, default_goal(cell, measure)) for size, cell in zip(study.sizes, study.cells, strict=True))
        size, default = next(((size, default) for size, default in found if default is not None), (0, None))
        if default is None:
            return None
        value, origin = default[1], f"{origin_of(measure, default[0].label)} at batch size {size}"
    return SweepGoal(measure.name, measure.label, measure.higher_is_better, value, given is not None, origin)


def _place(row: Row, goal: SweepGoal | None, measures: Sequence[Measure]) -> SweepPlace:
    finals = {
        measure.name: spread_of([measure.of(record.final) if record.final else None for record in row.finished])
        for measure in measures
    }
    measured = [point.diagnostics.get("r") for record in row.records for point in record.history]
    present = [value for value in measured if value is not None]
    return SweepPlace(
        finished=len(row.finished),
        attempted=len(row.records),
        reach=None if goal is None else reach(row, goal.value, goal.measure),
        finals={name: spread for name, spread in finals.items() if spread is not None},
        r=median(present) if present else None,
    )
