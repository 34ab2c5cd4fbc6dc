"""What a task is: data, model, loss, metrics, batch size and epochs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from steepest.training.data import Splits
from steepest.training.losses import Loss
from steepest.training.metrics import Metric

__all__ = ["Task"]


@dataclass(frozen=True)
class Task:
    """One entry of the task registry.

    Attributes:
        name: Name on the command line.
        description: One line for people.
        kind: Classification or regression.
        load: Splits for a data seed; the same seed gives the same splits.
        model: New model with torch's default initialisation.
        loss: Loss per sample.
        metrics: Numbers reported beside the loss, the main one first.
        batch_size: Samples per step.
        epochs: Passes over the training split when no budget is given.
        options: Options per optimizer that differ from the optimizer entry's own.
        options_source: How those options were chosen.
    """

    name: str
    description: str
    kind: Literal["classification", "regression"]
    load: Callable[[int], Splits]
    model: Callable[[], nn.Module]
    loss: Loss
    metrics: tuple[Metric, ...]
    batch_size: int
    epochs: int
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    options_source: str = "the optimizers' own defaults, nothing tuned"
