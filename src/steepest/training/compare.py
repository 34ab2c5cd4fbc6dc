"""Several optimizers on several tasks over several seeds: the plan, and carrying it out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import nn

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.data import Splits
from steepest.training.optimizer import OptimizerEntry
from steepest.training.options import check_options
from steepest.training.processes import launched
from steepest.training.records import EpochPoint, RecordStore, RunRecord
from steepest.training.registry import get_optimizer
from steepest.training.select_text import parse_selections
from steepest.training.selecting import try_out
from steepest.training.selections import SelectionPlan
from steepest.training.source import Source, fingerprinted, resolve
from steepest.training.spec import RunSpec
from steepest.training.task import Schedule, Task
from steepest.training.tuned import NOT_TUNED

__all__ = ["BatchSize", "Listener", "Request", "options_source", "plan_runs", "resolve_options", "run_all"]

BatchSize = int | Literal["all"]
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
        tasks: Where the tasks come from.
        optimizers: Names of optimizers.
        seeds: Seeds of initialisation and data order.
        epochs: Budget of epochs; None takes each task's own, unless seconds are given.
        seconds: Budget of training seconds per run.
        options: Options per optimizer, over the stored ones.
        schedule: Learning-rate schedule, the same for every optimizer; None takes each task's own.
        selections: What is selected to train on, each for every optimizer; None trains on everything.
        batch_sizes: Samples per step, "all" for the whole training split; every size is a comparison of its own.
            None takes each task's own.
        data_seed: Seed of the splits.
        device: Torch device.
        threads: Threads of torch on CPU; one is steadiest and, for small models, as fast as more.
    """

    tasks: Sequence[Source]
    optimizers: Sequence[str]
    seeds: Sequence[int]
    epochs: int | None = None
    seconds: float | None = None
    options: Mapping[str, Mapping[str, object]] | None = None
    schedule: Schedule | None = None
    batch_sizes: Sequence[BatchSize] | None = None
    selections: Sequence[str | None] = (None,)
    data_seed: int = 0
    device: str = "cpu"
    threads: int | None = 1


def resolve_options(task: Task, entry: OptimizerEntry, given: Mapping[str, object]) -> dict[str, object]:
    """Options of one optimizer on one task: the entry's, the task's stored ones, the user's, in that order.

    Args:
        task: The task.
        entry: The optimizer.
        given: What the user set.

    Returns:
        Checked options.

    Raises:
        InvalidOptionError: If a name, a type or a value is wrong.
    """
    own = {**entry.options, **entry.kind_options.get(task.kind, {})}
    options = check_options(entry.name, entry.specs(), {**own, **task.options.get(entry.name, {}), **given})
    try:
        # The constructor knows its impossible values best: ask it before hours of other runs have passed.
        entry.build(nn.Linear(1, 1), options)
    except SteepestError as error:
        raise InvalidOptionError(f"{entry.name}: {error}") from error
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidOptionError(f"{entry.name} does not take these options: {error}") from error
    return options


def options_source(task: Task, entry: OptimizerEntry, given: Mapping[str, object]) -> str:
    """How the options of `resolve_options` were chosen.

    Args:
        task: The task.
        entry: The optimizer.
        given: What the user set.

    Returns:
        Words for people.
    """
    stored = task.options_source if entry.name in task.options else None
    chosen = f"set by the user: {', '.join(given)}" if given else None
    return "; ".join(part for part in (stored or NOT_TUNED, chosen) if part)


def plan_runs(request: Request) -> list[RunSpec]:
    """All runs of a comparison; optimizers take turns, so that a slow hour of the machine hits them alike.

    Args:
        request: What to compare.

    Returns:
        The runs, by task, then seed, then optimizer, then selection.

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
    entries = [get_optimizer(name) for name in request.optimizers]
    plans = parse_selections(request.selections)
    for entry in entries:
        _check_full_batch(entry, plans)
    specs = [spec for source in request.tasks for spec in _plan_task(request, source, entries, plans)]
    if len({(spec.task, spec.optimizer, spec.select, spec.seed, spec.batch_size) for spec in specs}) < len(specs):
        raise InvalidOptionError(
            "two of the tasks have the same name, or two batch sizes are the same: rename a file, or give each size "
            "once"
        )
    return specs


def _plan_task(
    request: Request, source: Source, entries: Sequence[OptimizerEntry], plans: Sequence[SelectionPlan | None]
) -> list[RunSpec]:
    task, given = resolve(source), request.options or {}
    source = fingerprinted(source, task)
    options = {entry.name: resolve_options(task, entry, given.get(entry.name, {})) for entry in entries}
    own_epochs = task.epochs if request.seconds is None else None
    splits = task.load(request.data_seed)
    whole = len(splits.train)
    sizes = [whole if size == "all" else size for size in request.batch_sizes or [task.batch_size]]
    if max(sizes) > whole:
        raise InvalidOptionError(
            f"batch size {max(sizes)} is above the {whole} training samples of {task.name}: no batch would be "
            "complete; use a smaller one, or all"
        )
    epochs = request.epochs if request.epochs is not None else own_epochs
    for plan in filter(None, plans):
        plan.check(task.name, whole, max(sizes), epochs)
    model = task.model(splits.shape)  # a model that cannot be made is told now, and not by every run
    for plan in filter(None, plans):
        _try_selection(plan, task, model, splits)
    return [
        RunSpec(
            task=task.name,
            optimizer=entry.name,
            options=options[entry.name],
            seed=seed,
            data_seed=request.data_seed,
            epochs=epochs,
            seconds=request.seconds,
            schedule=request.schedule or task.schedule,
            batch_size=size,
            device=request.device,
            threads=request.threads,
            select=None if plan is None else plan.text,
            source=source,
            options_source=options_source(task, entry, given.get(entry.name, {})),
            untuned=_is_untuned(task, source, entry, given.get(entry.name, {}), size),
        )
        for size in sizes
        for seed in request.seeds
        for entry in entries
        for plan in plans
    ]


def _try_selection(plan: SelectionPlan, task: Task, model: nn.Module, splits: Splits) -> None:
    try:
        try_out(plan.method(), task, model, splits, plan.kept(len(splits.train)))
    except SteepestError as error:
        raise InvalidOptionError(f"selection {plan.text} cannot be made on {task.name}: {error}") from error


def _is_untuned(
    task: Task, source: Source, entry: OptimizerEntry, given: Mapping[str, object], batch_size: int
) -> bool:
    # A learning rate that is stored with a task was chosen for the task's own model and batch size.
    own = source.model is None and batch_size == task.batch_size
    stored = task.options.get(entry.name, {}) if own else {}
    return "lr" not in {**stored, **given}


def _check_budget(request: Request) -> None:
    tasks = [source.name for source in request.tasks]
    for kind, names in (("task", tasks), ("optimizer", request.optimizers)):
        if not names:
            raise InvalidOptionError(f"no {kind} was named: give at least one")
        if len(set(names)) < len(names):
            raise InvalidOptionError(f"a {kind} is named twice in {', '.join(names)}: name each once")
    if not request.selections:
        raise InvalidOptionError("no selection was given: use none to train on everything")
    if not request.seeds:
        raise InvalidOptionError("no seed was given: use at least one")
    for what, value in (
        ("epochs", request.epochs),
        ("budget of seconds", request.seconds),
        *(("batch size", size) for size in request.batch_sizes or () if size != "all"),
        ("number of threads", request.threads),
    ):
        if value is not None and not 0 < value < float("inf"):
            raise InvalidOptionError(f"the {what} is {value}: it must be a finite number above 0")


def _check_full_batch(entry: OptimizerEntry, plans: Sequence[SelectionPlan | None]) -> None:
    if not entry.full_batch:
        return
    if any(plan is not None for plan in plans):
        raise InvalidOptionError(
            f"{entry.name} takes the whole training split in every step, and a selection is to be trained on: leave "
            f"out --select or {entry.name}"
        )
    if launched() > 1:
        raise InvalidOptionError(
            f"{entry.name} takes the whole training split in every step and works in one process: start it without "
            "torchrun or leave it out"
        )


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n", maxsplit=1)[0][:160]
        raise InvalidOptionError(f"device {device!r} cannot be used here: {reason}; use cpu") from error


def run_all(
    specs: Sequence[RunSpec],
    store: RecordStore,
    listener: Listener,
    execute: Execute,
    *,
    fresh: bool = False,
    writes: bool = True,
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
        writes: Whether this process keeps the records; of several that make the runs together one does.

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
        if writes:
            store.write(spec, record)
        listener.run_done(spec, record, resumed=False)
        records.append(record)
    return records
