"""What a task is: data, model, loss, metrics, batch size and epochs; from memory or from files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import nn

from steepest.training.data import Shape, Splits
from steepest.training.losses import Loss
from steepest.training.metrics import Metric

__all__ = ["FileTask", "Kind", "Schedule", "Task"]

Kind = Literal["classification", "regression"]
Schedule = Literal["constant", "linear", "trapezoidal", "auto"]


@dataclass(frozen=True)
class Task:
    """One entry of the task registry.

    Attributes:
        name: Name on the command line.
        description: One line for people.
        kind: Classification or regression.
        load: Splits for a data seed; the same seed gives the same splits.
        model: New model for data of a shape, with torch's default initialisation.
        loss: Loss per sample.
        metrics: Numbers reported beside the loss, the main one first.
        batch_size: Samples per step.
        epochs: Passes over the training split when no budget is given.
        schedule: Schedule of the learning rate when none is given.
        options: Options per optimizer that differ from the optimizer entry's own.
        options_source: How those options were chosen; None where nothing was: the optimizers' own defaults.
        files: Files that decide the data: another content makes another run.
        notes: What a user should be told about the data, such as what was inferred.
        features: Names of the inputs in their order, where they have names.
        classes: Names of the classes in the order of their numbers, where they have names.
    """

    name: str
    description: str
    kind: Kind
    load: Callable[[int], Splits]
    model: Callable[[Shape], nn.Module]
    loss: Loss
    metrics: tuple[Metric, ...]
    batch_size: int
    epochs: int
    schedule: Schedule = "linear"
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    options_source: str | None = None
    files: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class FileTask:
    """Entry of a task whose data the user has as files.

    Attributes:
        name: Name on the command line.
        description: One line for people.
        kind: Classification or regression.
        files: What it looks for in the data folder, for people.
        origin: Where one gets the files, for people.
        at: The task, given the data folder; a `DataError` if files are missing.
    """

    name: str
    description: str
    kind: Kind
    files: str
    origin: str
    at: Callable[[Path], Task]
