"""Time to goal: when each optimizer first reached a validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from steepest.report.groups import Cell, Row
from steepest.training.records import EpochPoint, RunRecord

__all__ = ["Goal", "Reach", "goal_of"]

_REFERENCES = ("adam", "adamw")


@dataclass(frozen=True)
class Reach:
    """How the runs of one row got to the goal.

    Attributes:
        label: Name of the row.
        reached: Runs that got there.
        attempted: Runs that were made.
        epochs: Median epoch of the first evaluation at or below the goal, over the runs that got there.
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
class Goal:
    """A validation loss and who got there.

    Attributes:
        val_loss: The goal.
        given: Whether the user gave it.
        reference: Name of the row that the others are compared with.
        rows: One entry per row of the cell.
    """

    val_loss: float
    given: bool
    reference: str
    rows: tuple[Reach, ...]

    @property
    def origin(self) -> str:
        """Where the goal comes from."""
        return "given by the user" if self.given else f"the largest final loss of {self.reference}'s finished runs"


def goal_of(cell: Cell, given: float | None = None) -> Goal | None:
    """Find or take a goal and see who reached it.

    Without a given one it is the largest final validation loss of the reference's finished runs, which all of
    them reach by definition. The reference is Adam or AdamW if it finished a run, else the first row that did.

    Args:
        cell: Runs that may be compared.
        given: The goal, if the user has one.

    Returns:
        The goal, or None if there is nothing to compare: one row alone, or no finished run.
    """
    candidates = [row for row in cell.rows if _last_losses(row)]
    usual = [row for name in _REFERENCES for row in candidates if row.optimizer == name]
    reference = next(iter([*usual, *candidates]), None)
    if given is None:
        if reference is None or len(cell.rows) < 2:
            return None
        goal = max(_last_losses(reference))
    else:
        goal = given
    reference = reference or cell.rows[0]
    base = _reach(reference, goal, None).seconds
    rows = tuple(_reach(row, goal, base) for row in cell.rows)
    return Goal(goal, given is not None, reference.label, rows)


def _last_losses(row: Row) -> list[float]:
    # Of the history, not of `final`: on a GPU two evaluations of one model may differ in the last digit.
    last = [record.history[-1].val_loss for record in row.finished if record.history]
    return [loss for loss in last if loss is not None]


def _reach(row: Row, goal: float, base: float | None) -> Reach:
    points = [point for record in row.records if (point := _first(record, goal)) is not None]
    if not points:
        return Reach(row.label, 0, len(row.records))
    seconds = _seconds(points)
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


def _seconds(points: Sequence[EpochPoint]) -> list[float]:
    return [point.seconds for point in points]


def _first(record: RunRecord, goal: float) -> EpochPoint | None:
    return next((point for point in record.history if point.val_loss is not None and point.val_loss <= goal), None)
