"""Time to goal: when each optimizer first reached a validation loss or a value of a metric."""

from dataclasses import dataclass
from statistics import median

from steepest.report.groups import Cell, Row
from steepest.report.measure import LOSS, Measure
from steepest.training.records import EpochPoint, RunRecord

__all__ = ["Goal", "Reach", "Target", "default_goal", "goal_of", "origin_of", "reach"]

_REFERENCES = ("adam", "adamw")


@dataclass(frozen=True)
class Reach:
    """How the runs of one row got to the goal.

    Attributes:
        label: Name of the row.
        reached: Runs that got there.
        attempted: Runs that were made.
        epochs: Median epoch of the first evaluation that meets the goal, over the runs that got there.
        seconds: Median training time at that evaluation.
        fastest: Least training time.
        slowest: Most training time.
        ratio: Seconds divided by those of the reference.
    """

    label: str
    reached: int
    attempted: int
    epochs: float | None = None
    seconds: float | None = None
    fastest: float | None = None
    slowest: float | None = None
    ratio: float | None = None


@dataclass(frozen=True)
class Target:
    """A value to be reached.

    Attributes:
        metric: Name of what it is a value of: `val_loss` or a metric of the task.
        label: What that is called after the word "validation".
        higher_is_better: Its direction.
        value: The value.
    """

    metric: str
    label: str
    higher_is_better: bool
    value: float

    @property
    def measure(self) -> Measure:
        """What it is a value of."""
        return Measure(self.metric, self.label, self.higher_is_better)

    @property
    def text(self) -> str:
        """The value as people read it."""
        return self.measure.text(self.value)


@dataclass(frozen=True)
class Goal(Target):
    """A value to be reached and who got there.

    Attributes:
        given: Whether the user gave it.
        reference: Name of the row that the others are compared with.
        rows: One entry per row of the cell.
    """

    given: bool
    reference: str
    rows: tuple[Reach, ...]

    @property
    def origin(self) -> str:
        """Where the goal comes from."""
        return "given by the user" if self.given else origin_of(self.measure, self.reference)


def origin_of(measure: Measure, reference: str) -> str:
    """Where a default goal comes from.

    Args:
        measure: What it is a value of.
        reference: Name of the row that set it.

    Returns:
        The words.
    """
    worst = "smallest" if measure.higher_is_better else "largest"
    return f"the {worst} final {measure.label} of {reference}'s finished runs"


def goal_of(cell: Cell, given: float | None = None, measure: Measure = LOSS) -> Goal | None:
    """Find or take a goal and see who reached it.

    Args:
        cell: Runs that may be compared.
        given: The goal, if the user has one; else it is the default one.
        measure: What the goal is a value of.

    Returns:
        The goal, or None if there is nothing to compare: one row alone, or no finished run.
    """
    default = default_goal(cell, measure)
    if given is None and (default is None or len(cell.rows) < 2):
        return None
    reference, worst = default or (cell.rows[0], 0.0)
    value = worst if given is None else given
    base = reach(reference, value, measure).seconds
    rows = tuple(reach(row, value, measure, base) for row in cell.rows)
    return Goal(measure.name, measure.label, measure.higher_is_better, value, given is not None, reference.label, rows)


def default_goal(cell: Cell, measure: Measure) -> tuple[Row, float] | None:
    """The worst final value of the reference's finished runs, which all of them reach by definition.

    The reference is Adam or AdamW if it finished a run, else the first row that did; on all of the data, if any row
    was trained on that.

    Args:
        cell: Runs that may be compared.
        measure: What the goal is a value of.

    Returns:
        The reference and the goal, or None if no run finished.
    """
    candidates = [row for row in cell.rows if _last_values(row, measure)]
    usual = [row for name in _REFERENCES for row in candidates if row.optimizer == name]
    # Stable: among rows of one kind the order stays.
    ranked = sorted([*usual, *candidates], key=lambda row: row.select is not None)
    reference = next(iter(ranked), None)
    return None if reference is None else (reference, measure.worst_of(_last_values(reference, measure)))


def _last_values(row: Row, measure: Measure) -> list[float]:
    # Of the history, not of `final`: on a GPU two evaluations of one model may differ in the last digit.
    last = [measure.of(record.history[-1]) for record in row.finished if record.history]
    return [value for value in last if value is not None]


def reach(row: Row, goal: float, measure: Measure, base: float | None = None) -> Reach:
    """See how the runs of a row got to a goal.

    Args:
        row: The runs.
        goal: The goal.
        measure: What it is a value of.
        base: Seconds of the reference.

    Returns:
        The answer.
    """
    points = [point for record in row.records if (point := _first(record, goal, measure)) is not None]
    if not points:
        return Reach(row.label, 0, len(row.records))
    seconds = [point.seconds for point in points]
    middle = median(seconds)
    return Reach(
        label=row.label,
        reached=len(points),
        attempted=len(row.records),
        epochs=median(point.epoch for point in points),
        seconds=middle,
        fastest=min(seconds),
        slowest=max(seconds),
        ratio=middle / base if base else None,
    )


def _first(record: RunRecord, goal: float, measure: Measure) -> EpochPoint | None:
    return next((point for point in record.history if measure.meets(measure.of(point), goal)), None)
