"""The training loop: one function for all optimizers.

The clock runs only while an optimizer takes its step (forward and backward included). Cutting batches,
evaluation, the learning-rate schedule and the check for divergence are outside of it.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from steepest.training.data import Splits, batches
from steepest.training.evaluate import evaluate
from steepest.training.optimizer import OptimizerEntry
from steepest.training.records import EpochPoint, finite
from steepest.training.spec import RunSpec
from steepest.training.steps import StepFunction
from steepest.training.task import Task

__all__ = ["DivergedError", "Trainer"]


class DivergedError(ArithmeticError):
    """The loss of a batch is no longer finite."""


@dataclass
class Trainer:
    """A run in progress.

    Attributes:
        spec: What to do.
        task: The task.
        entry: The optimizer's registry entry.
        model: The model, trained in place.
        optimizer: The optimizer on it.
        splits: The data, on the run's device.
        steps: Steps taken so far.
        seconds: Training time so far.
        history: Points so far, the untrained model first.
    """

    spec: RunSpec
    task: Task
    entry: OptimizerEntry
    model: nn.Module
    optimizer: torch.optim.Optimizer
    splits: Splits
    steps: int = 0
    seconds: float = 0.0
    history: list[EpochPoint] = field(default_factory=list)

    def __post_init__(self) -> None:
        per_epoch = len(self.splits.train) // self.spec.batch_size
        self._total_steps = None if self.spec.epochs is None else self.spec.epochs * per_epoch
        self._on_cuda = self.spec.device.startswith("cuda")

    def run(self, on_epoch: Callable[[EpochPoint], None]) -> None:
        """Train until the budget is spent.

        Args:
            on_epoch: Called with every new point of the history.

        Raises:
            DivergedError: If the loss of a batch is not finite; steps, seconds and history remain.
        """
        self._add_point(0, None, on_epoch)
        step = self.entry.step(self.spec.options)
        base_lrs = [float(group["lr"]) for group in self.optimizer.param_groups]
        for epoch in self._epochs():
            losses = []
            for inputs, targets in self._batches(epoch):
                self._set_lr(base_lrs)
                loss = self._timed_step(step, inputs, targets)
                if loss is not None and not math.isfinite(loss):
                    raise DivergedError(f"the loss of step {self.steps} is {loss}")
                losses += [loss] if loss is not None else []
                if self.spec.seconds is not None and self.seconds >= self.spec.seconds:
                    break
            self._add_point(epoch, sum(losses) / len(losses) if losses else None, on_epoch)

    def _epochs(self) -> Iterator[int]:
        epoch = 0
        while self._progress() < 1.0:
            epoch += 1
            yield epoch

    def _batches(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        size = self.spec.batch_size
        return batches(self.splits.train, batch_size=size, seed=self.spec.seed, epoch=epoch)

    def _progress(self) -> float:
        """Part of the budget that is spent, 0 to 1."""
        spec = self.spec
        by_steps = 0.0 if self._total_steps is None else self.steps / self._total_steps
        by_seconds = 0.0 if spec.seconds is None else self.seconds / spec.seconds
        return min(1.0, max(by_steps, by_seconds))

    def _set_lr(self, base_lrs: list[float]) -> None:
        if self.spec.schedule == "constant":
            return
        factor = 1.0 - self._progress()
        for group, base in zip(self.optimizer.param_groups, base_lrs, strict=True):
            group["lr"] = base * factor

    def _timed_step(self, step: StepFunction, inputs: Tensor, targets: Tensor) -> float | None:
        self._synchronise()
        start = time.perf_counter()
        loss = step(self.optimizer, self.model, self.task.loss, inputs, targets)
        self._synchronise()
        self.seconds += time.perf_counter() - start
        self.steps += 1
        return None if loss is None else loss.item()

    def _synchronise(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    def _add_point(self, epoch: int, train_loss: float | None, on_epoch: Callable[[EpochPoint], None]) -> None:
        scores = evaluate(self.task, self.model, self.splits.val)
        diagnostics = self.entry.diagnose(self.optimizer) if epoch else {}
        point = EpochPoint(
            epoch=epoch,
            steps=self.steps,
            seconds=self.seconds,
            train_loss=train_loss,
            val_loss=finite(scores.loss),
            val_metrics=scores.metrics,
            diagnostics={name: finite(value) for name, value in diagnostics.items()},
        )
        self.history.append(point)
        on_epoch(point)
