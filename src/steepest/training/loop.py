"""The training loop: one function for all optimizers.

The clock runs only while an optimizer takes its step (forward and backward included). Cutting batches,
evaluation, the schedules of the learning rate and of other options, checkpoints and the check for divergence are
outside of it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from math import isfinite

import torch
from torch import Tensor, nn

from steepest.training.data import Splits, batches
from steepest.training.evaluate import evaluate
from steepest.training.optimizer import OptimizerEntry
from steepest.training.records import EpochPoint, finite
from steepest.training.spec import RunSpec
from steepest.training.steps import StepFunction
from steepest.training.task import Task

__all__ = ["DivergedError", "Progress", "Trainer"]


class DivergedError(ArithmeticError):
    """The loss of a batch is no longer finite."""


@dataclass
class Progress:
    """How far a run is; with the states of model, optimizer and generators it is all that a run is made of.

    Attributes:
        epoch: Epoch that is being trained, from 1.
        batch: Batches of that epoch that are done.
        steps: Steps taken so far.
        seconds: Training time so far.
        losses: Mean loss of every batch of this epoch so far.
        history: Points so far, the untrained model first.
    """

    epoch: int = 1
    batch: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[EpochPoint] = field(default_factory=list)


def _nothing() -> None:
    """What a run without checkpoints does between two steps."""


@dataclass
class Trainer:
    """A run that is being made.

    Attributes:
        spec: What to do.
        task: The task.
        entry: The optimizer's registry entry.
        model: The model, trained in place.
        optimizer: The optimizer on it.
        splits: The data, on the run's device.
        progress: How far it is.
        base_lrs: Learning rate of every parameter group before the schedule.
    """

    spec: RunSpec
    task: Task
    entry: OptimizerEntry
    model: nn.Module
    optimizer: torch.optim.Optimizer
    splits: Splits
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        self.base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        self._steps_per_epoch = len(self.splits.train) // self.spec.batch_size
        self._on_cuda = self.spec.device.startswith("cuda")

    def run(self, on_epoch: Callable[[EpochPoint], None], before_step: Callable[[], None] = _nothing) -> None:
        """Train until the budget is spent, from wherever the run is.

        Args:
            on_epoch: Called with every new point of the history.
            before_step: Called before every step, when all states belong together; what it raises ends the run.

        Raises:
            DivergedError: If the loss of a batch is not finite; the progress remains.
        """
        progress = self.progress
        if not progress.history:
            self._add_point(0, None, on_epoch)
        step = self.entry.step(self.spec.options)
        while not self._finished():
            for inputs, targets in self._rest_of_epoch():
                before_step()
                self._set_lr()
                self.entry.anneal(self.optimizer, self._fraction())
                loss = self._timed_step(step, inputs, targets)
                if loss is not None and not isfinite(loss):
                    raise DivergedError(f"the loss of step {progress.steps} is {loss}")
                progress.losses += [loss] if loss is not None else []
                progress.batch += 1
                if self._out_of_seconds():
                    break
            losses = progress.losses
            self._add_point(progress.epoch, sum(losses) / len(losses) if losses else None, on_epoch)
            progress.epoch, progress.batch, progress.losses = progress.epoch + 1, 0, []

    def _rest_of_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        spec, progress = self.spec, self.progress
        every = batches(self.splits.train, batch_size=spec.batch_size, seed=spec.seed, epoch=progress.epoch)
        return islice(every, progress.batch, None)

    def _out_of_seconds(self) -> bool:
        return self.spec.seconds is not None and self.progress.seconds >= self.spec.seconds

    def _finished(self) -> bool:
        epochs = self.spec.epochs
        return self._out_of_seconds() or (epochs is not None and self.progress.epoch > epochs)

    def _fraction(self) -> float:
        """Part of the budget that is spent at this step, 0 to 1."""
        spec, progress = self.spec, self.progress
        by_steps = 0.0 if spec.epochs is None else progress.steps / (spec.epochs * self._steps_per_epoch)
        by_seconds = 0.0 if spec.seconds is None else progress.seconds / spec.seconds
        return min(1.0, max(by_steps, by_seconds))

    def _set_lr(self) -> None:
        if self.spec.schedule == "constant":
            return
        factor = 1.0 - self._fraction()
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _timed_step(self, step: StepFunction, inputs: Tensor, targets: Tensor) -> float | None:
        self._synchronise()
        start = time.perf_counter()
        loss = step(self.optimizer, self.model, self.task.loss, inputs, targets)
        self._synchronise()
        self.progress.seconds += time.perf_counter() - start
        self.progress.steps += 1
        return None if loss is None else loss.item()

    def _synchronise(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    def _add_point(self, epoch: int, train_loss: float | None, on_epoch: Callable[[EpochPoint], None]) -> None:
        scores = evaluate(self.task, self.model, self.splits.val)
        diagnosis = self.entry.diagnose(self.optimizer) if epoch else {}
        point = EpochPoint(
            epoch=epoch,
            steps=self.progress.steps,
            seconds=self.progress.seconds,
            train_loss=train_loss,
            val_loss=finite(scores.loss),
            val_metrics=scores.metrics,
            diagnostics={name: finite(value) for name, value in diagnosis.items() if isinstance(value, float)},
            series={name: row for name, row in diagnosis.items() if isinstance(row, tuple) and all(map(isfinite, row))},
        )
        self.progress.history.append(point)
        on_epoch(point)
