"""What a goal is a value of: the validation loss, or a metric on the validation split."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from steepest.report.words import number, score
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.records import EpochPoint, Final, MetricNote, Problem

__all__ = ["LOSS", "Goals", "Measure", "check_metric", "measure_of"]


@dataclass(frozen=True)
class Measure:
    """A number that every evaluation has.

    Attributes:
        name: Its key: `val_loss`, or the name of a metric of the task.
        label: What it is called after the word "validation".
        higher_is_better: Its direction.
    """

    name: str
    label: str
    higher_is_better: bool

    @property
    def words(self) -> str:
        """What it is called."""
        return f"validation {self.label}"

    @property
    def worst(self) -> float:
        """What a value that is not finite counts as: leaving it out would flatter a median."""
        return -math.inf if self.higher_is_better else math.inf

    def of(self, evaluated: EpochPoint | Final) -> float | None:
        """Its value.

        Args:
            evaluated: An evaluation.

        Returns:
            The value, None where it is missing or not finite.
        """
        value = evaluated.val_loss if self.name == LOSS.name else evaluated.val_metrics.get(self.name)
        return value if value is not None and math.isfinite(value) else None

    def worst_of(self, values: Iterable[float]) -> float:
        """The worst of some values.

        Args:
            values: At least one.

        Returns:
            One of them.
        """
        return min(values) if self.higher_is_better else max(values)

    def meets(self, value: float | None, goal: float) -> bool:
        """Whether a value is at least as good as a goal; one that is missing is not.

        Args:
            value: The value.
            goal: The goal.

        Returns:
            The answer.
        """
        if value is None:
            return False
        return value >= goal if self.higher_is_better else value <= goal

    def text(self, value: float) -> str:
        """A value as people read it.

        Args:
            value: The value.

        Returns:
            The text.
        """
        return score(value) if self.higher_is_better else number(value)


LOSS = Measure("val_loss", "loss", higher_is_better=False)


@dataclass(frozen=True)
class Goals:
    """What a report times.

    Attributes:
        values: The goal of each task; a task that is not in it has the default goal.
        metric: Name of the metric that the goals are values of; None stands for the validation loss.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    metric: str | None = None


def measure_of(problem: Problem, name: str | None) -> Measure:
    """Find what a goal is a value of.

    Args:
        problem: What was trained on.
        name: `val_loss` or a metric of the problem; None takes the validation loss.

    Returns:
        The measure.
    """
    if name is None or name == LOSS.name:
        return LOSS
    known: dict[str, MetricNote] = {metric.name: metric for metric in problem.metrics}
    check_metric(problem.description, name, list(known))
    return Measure(name, known[name].label, known[name].higher_is_better)


def check_metric(task: str, name: str | None, metrics: Sequence[str]) -> None:
    """See that a task has what a goal is to be a value of.

    Args:
        task: Name of the task, for the message.
        name: What the user named.
        metrics: Names of the task's metrics.

    Raises:
        UnknownNameError: If it does not.
    """
    known = [LOSS.name, *metrics]
    if name is not None and name not in known:
        raise UnknownNameError(unknown(f"goal metric of {task}", name, known))
