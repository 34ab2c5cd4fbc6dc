"""The training loop: one function for all optimizers.

The clock runs only while an optimizer takes its step (forward and backward included) and while a subset is
selected. Cutting batches, evaluation, the schedules of the learning rate and of other options, checkpoints and the
check for divergence are outside of it.

An epoch has as many steps on a subset as on all of the data: budgets, schedules and evaluations stay comparable.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from steepest.distributed import Ranks
from steepest.distributed.contact import contact
from steepest.errors import InvalidOptionError
from steepest.training.data import Splits, batches
from steepest.training.evaluate import evaluate
from steepest.training.optimizer import OptimizerEntry
from steepest.training.processes import check_shares, replica, share
from steepest.training.records import EpochPoint, Selected, finite
from steepest.training.select_text import parse_selection
from steepest.training.selecting import noted, select_now
from steepest.training.spec import RunSpec
from steepest.training.steps import StepFunction
from steepest.training.subsets import Subset, subset_batches
from steepest.training.task import Task

if TYPE_CHECKING:
    from steepest.selection.keeping import Keep

__all__ = ["DivergedError", "Progress", "Trainer"]

_HELD = 0.6  # of a trapezoidal schedule: the part of the budget before the rate falls


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
        selections: What was selected so far.
    """

    epoch: int = 1
    batch: int = 0
    steps: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    history: list[EpochPoint] = field(default_factory=list)
    selections: list[Selected] = field(default_factory=list)


def _nothing() -> None:
    """What a run without checkpoints does between two steps."""


@dataclass
class Trainer:
    """A run that is being made.

    Several processes: beside what the optimizer sends, every step sums 32 bytes over the ranks (loss, seconds and what
    is to be done before the next step), and the first one after an evaluation 8 more.

    Attributes:
        spec: What to do.
        task: The task.
        entry: The optimizer's registry entry.
        model: The model, trained in place.
        optimizer: The optimizer on it.
        splits: The data, on the run's device.
        progress: How far it is.
        subset: What is trained on at present; None for everything.
        ranks: The processes that share every batch; None for one alone. All of them make the same run.
        keep: Where selections are kept while they are made; None where they are not.
        ask: Whether this process is to stop, and to write a checkpoint, before its next step.
        asked: What any of the processes was asked to do before the next step; None where they have not agreed on it
            since the last step.
        base_lrs: Learning rate of every parameter group before the schedule.
    """

    spec: RunSpec
    task: Task
    entry: OptimizerEntry
    model: nn.Module
    optimizer: torch.optim.Optimizer
    splits: Splits
    progress: Progress = field(default_factory=Progress)
    subset: Subset | None = None
    ranks: Ranks | None = None
    keep: "Keep | None" = None
    ask: Callable[[], tuple[bool, bool]] = lambda: (False, False)
    asked: tuple[bool, bool] | None = None

    def __post_init__(self) -> None:
        check_shares(self.spec.batch_size, self.ranks)
        self._replica = replica(self.model, self.entry, self.ranks, self._first_loss)
        self._plan = None if self.spec.select is None else parse_selection(self.spec.select)
        if self.subset is not None:
            self.progress.selections = [noted(self.subset, self.splits.train, epoch=1)]
        self._check_subset()
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
            InvalidOptionError: If a subset is smaller than a batch.
        """
        progress = self.progress
        if not progress.history:
            self._add_point(0, None, on_epoch)
        step = self.entry.step(self.spec.options)
        while not self._finished():
            self._select(before_step)
            if self._out_of_seconds():
                break
            for inputs, targets in self._rest_of_epoch():
                before_step()
                self._set_lr()
                self.entry.anneal(self.optimizer, self._fraction())
                loss = self._timed_step(step, share(inputs, self.ranks), share(targets, self.ranks))
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
        train, size, seed, epoch = self.splits.train, spec.batch_size, spec.seed, progress.epoch
        if self.subset is None:
            every = batches(train, batch_size=size, seed=seed, epoch=epoch)
        else:
            every = subset_batches(train, self.subset, batch_size=size, seed=seed, epoch=epoch)
        return islice(every, progress.batch, None)

    def _select(self, between: Callable[[], None]) -> None:
        """Select what the next epochs are trained on, if it is time to and was not done before a checkpoint."""
        plan, epoch, done = self._plan, self.progress.epoch, self.progress.selections
        if plan is None or not plan.due(epoch) or (done and done[-1].epoch == epoch):
            return
        self._synchronise()
        start = time.perf_counter()
        # All states are those of before the selection until it is done: a checkpoint meanwhile has it made again.
        # Of several processes the first alone is told of progress, and all would have to save together.
        meanwhile = between if self.ranks is None else _nothing
        subset, numbers = select_now(
            plan, self.spec.seed, epoch, self.task, self.model, self.splits, meanwhile, self.keep
        )
        self._synchronise()
        _, seconds = self._agreed(None, time.perf_counter() - start)
        self.asked = None
        self.subset = subset
        self.progress.seconds += seconds
        done.append(replace(numbers, seconds=seconds))
        self._check_subset()

    def _check_subset(self) -> None:
        if self.subset is not None and len(self.subset) < self.spec.batch_size:
            raise InvalidOptionError(
                f"the subset has {len(self.subset)} samples and a batch {self.spec.batch_size}: no batch would be "
                "without repetitions; keep more samples or use a smaller batch size"
            )

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
        own = self.spec.schedule == "auto" and self.entry.finds_length(self.spec.options)
        if self.spec.schedule == "constant" or own:
            return
        left = 1.0 - self._fraction()
        factor = min(1.0, left / (1.0 - _HELD)) if self.spec.schedule == "trapezoidal" else left
        for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
            group["lr"] = base * factor

    def _timed_step(self, step: StepFunction, inputs: Tensor, targets: Tensor) -> float | None:
        self._synchronise()
        start = time.perf_counter()
        with contact():  # gradients that DistributedDataParallel averages travel in here
            loss = step(self.optimizer, self._replica, self.task.loss, inputs, targets)
            self._synchronise()
        number, seconds = self._agreed(None if loss is None else loss.item(), time.perf_counter() - start)
        self.progress.seconds += seconds
        self.progress.steps += 1
        return number

    def _first_loss(self, model: nn.Module) -> Tensor:
        first = slice(self.spec.batch_size)
        return self.task.loss.per_sample(
            model(self.splits.train.inputs[first]), self.splits.train.targets[first]
        ).mean()

    def _agreed(self, loss: float | None, seconds: float) -> tuple[float | None, float]:
        """Means over the ranks: what decides about the run must be the same number on all of them."""
        if self.ranks is None:
            return loss, seconds
        # What comes before the next step travels with them: small sums are all waiting.
        told = (0.0 if loss is None else loss, seconds, *map(float, self.ask()))
        means = torch.tensor(told, dtype=torch.float64, device=self.spec.device)
        self.ranks.sum_([means])
        mean_loss, mean_seconds, stop, due = (means / self.ranks.size).tolist()
        self.asked = stop > 0, due > 0
        return None if loss is None else mean_loss, mean_seconds

    def _synchronise(self) -> None:
        if self._on_cuda:
            torch.cuda.synchronize()

    def _add_point(self, epoch: int, train_loss: float | None, on_epoch: Callable[[EpochPoint], None]) -> None:
        if self.ranks is not None:  # running statistics of BatchNorm are each process's own
            self.ranks.broadcast_([buffer for buffer in self.model.buffers() if buffer.numel()], 0)
        scores = evaluate(self.task, self.model, self.splits.val)
        self.asked = None  # a signal that came meanwhile is not in it
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
