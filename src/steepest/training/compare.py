"""Several optimizers on several tasks over several seeds: the plan, and carrying it out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.optimizer import OptimizerEntry
from steepest.training.options import check_options
from steepest.training.records import EpochPoint, RecordStore, RunRecord
from steepest.training.registry import get_optimizer, get_task
from steepest.training.spec import RunSpec, Schedule

__all__ = ["Listener", "Request", "plan_runs", "resolve_options", "run_all"]

Execute = Callable[[RunSpec, Callable[[EpochPoint], None]], RunRecord]


class Listener(Protocol):
    """Somebody who watches a comparison."""

    def run_started(self, spec: RunSpec, number: int, total: int) -> None:
        """A run begins; `number` counts from 1."""
        ...

    def epoch_done(self, spec: RunSpec, point: EpochPoint) -> None:
        """A run has a new point."""
        ...

    def run_done(self, spec: RunSpec, record: RunRecord, *, resumed: bool) -> None:
        """A run has a record; `resumed` says that it was there before."""
        ...


@dataclass(frozen=True)
class Request:
    """What to compare.

    Attributes:
        tasks: Names of tasks.
        optimizers: Names of optimizers.
        seeds: Seeds of initialisation and data order.
        epochs: Budget of epochs; None takes each task's own, unless seconds are given.
        seconds: Budget of training seconds per run.
        options: Options per optimizer, over the stored ones.
        schedule: Learning-rate schedule, the same for every optimizer.
        batch_size: Samples per step; None takes each task's own.
        data_seed: Seed of the splits.
        device: Torch device.
        threads: Threads of torch on CPU; one is steadiest and, for small models, as fast as more.
    """

    tasks: Sequence[str]
    optimizers: Sequence[str]
    seeds: Sequence[int]
    epochs: int | None = None
    seconds: float | None = None
    options: Mapping[str, Mapping[str, object]] | None = None
    schedule: Schedule = "linear"
    batch_size: int | None = None
    data_seed: int = 0
    device: str = "cpu"
    threads: int | None = 1


def resolve_options(task_name: str, entry: OptimizerEntry, given: Mapping[str, object]) -> dict[str, object]:
    """Options of one optimizer on one task: the entry's, the task's stored ones, the user's, in that order.

    Args:
        task_name: Name of the task.
        entry: The optimizer.
        given: What the user set.

    Returns:
        Checked options.

    Raises:
        InvalidOptionError: If a name, a type or a value is wrong.
    """
    stored = get_task(task_name).options.get(entry.name, {})
    options = check_options(entry.name, entry.specs(), {**entry.options, **stored, **given})
    try:
        # The constructor knows its impossible values best: ask it before hours of other runs have passed.
        entry.build(nn.Linear(1, 1), options)
    except SteepestError as error:
        raise InvalidOptionError(f"{entry.name}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOptionError(f"{entry.name} does not take these options: {error}") from error
    return options


def plan_runs(request: Request) -> list[RunSpec]:
    """All runs of a comparison; optimizers take turns, so that a slow hour of the machine hits them alike.

    Args:
        request: What to compare.

    Returns:
        The runs, by task, then seed, then optimizer.

    Raises:
        InvalidOptionError: If a name, a budget or an option is wrong.
    """
    _check_budget(request)
    _check_device(request.device)
    given = request.options or {}
    for name in given:
        if name not in request.optimizers:
            raise InvalidOptionError(
                f"an option is set for {name!r}, which is not compared; add it to the optimizers "
                f"({', '.join(request.optimizers)}) or drop the option"
            )
    specs = []
    for task_name in request.tasks:
        task = get_task(task_name)
        entries = [get_optimizer(name) for name in request.optimizers]
        options = {entry.name: resolve_options(task_name, entry, given.get(entry.name, {})) for entry in entries}
        own_epochs = task.epochs if request.seconds is None else None
        batch_size = request.batch_size or task.batch_size
        train_size = len(task.load(request.data_seed).train)
        if batch_size > train_size:
            raise InvalidOptionError(
                f"batch size {batch_size} is above the {train_size} training samples of {task_name}: "
                "no batch would be complete; use a smaller one"
            )
        specs += [
            RunSpec(
                task=task_name,
                optimizer=entry.name,
                options=options[entry.name],
                seed=seed,
                data_seed=request.data_seed,
                epochs=request.epochs if request.epochs is not None else own_epochs,
                seconds=request.seconds,
                schedule=request.schedule,
                batch_size=batch_size,
                device=request.device,
                threads=request.threads,
            )
            for seed in request.seeds
            for entry in entries
        ]
    return specs


def _check_budget(request: Request) -> None:
    for kind, names in (("task", request.tasks), ("optimizer", request.optimizers)):
        if not names:
            raise InvalidOptionError(f"no {kind} was named: give at least one")
        if len(set(names)) < len(names):
            raise InvalidOptionError(f"a {kind} is named twice in {', '.join(names)}: name each once")
    if not request.seeds:
        raise InvalidOptionError("no seed was given: use at least one")
    for what, value in (
        ("epochs", request.epochs),
        ("budget of seconds", request.seconds),
        ("batch size", request.batch_size),
        ("number of threads", request.threads),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InvalidOptionError(f"the {what} is {value}: it must be a finite number above 0")


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise InvalidOptionError(f"device {device!r} cannot be used here: {reason}; use cpu") from error


def run_all(
    specs: Sequence[RunSpec], store: RecordStore, listener: Listener, execute: Execute, *, fresh: bool = False
) -> list[RunRecord]:
    """Carry out a plan; runs that have a record already are not repeated.

    Runs that failed or timed out before are tried again: their cause may lie outside of them. Diverged runs
    are results and are kept.

    Args:
        specs: The plan.
        store: Where the records are.
        listener: Who watches.
        execute: How a run is made.
        fresh: Repeat every run.

    Returns:
        One record per run, in the plan's order.
    """
    records = []
    for number, spec in enumerate(specs, start=1):
        known = None if fresh else store.read(spec)
        if known is not None and known.status in {"finished", "diverged"}:
            listener.run_done(spec, known, resumed=True)
            records.append(known)
            continue
        listener.run_started(spec, number, len(specs))
        record = execute(spec, lambda point, spec=spec: listener.epoch_done(spec, point))  # type: ignore[misc]
        store.write(spec, record)
        listener.run_done(spec, record, resumed=False)
        records.append(record)
    return records
