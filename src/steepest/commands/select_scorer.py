"""The model that a selection is made with: trained for a while, or brought along."""

import pickle
import time
import zipfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from steepest.commands.select_settings import Places, SelectSettings
from steepest.commands.select_shared import is_there, leads
from steepest.distributed import Ranks
from steepest.errors import SelectionError
from steepest.report.groups import label_of
from steepest.report.live import listener_for
from steepest.report.selection_words import Scorer
from steepest.report.words import count, number
from steepest.selection.together import Together, attempt
from steepest.training.checkpoint import Keeping, forget
from steepest.training.data import Splits, batches
from steepest.training.execute import execute
from steepest.training.processes import replica, share
from steepest.training.records import RunRecord
from steepest.training.registry import get_optimizer
from steepest.training.spec import RunSpec
from steepest.training.stopping import stop_requested
from steepest.training.task import Task
from steepest.training.trained import write_tensors

__all__ = ["Scored", "epoch_seconds", "make_scorer", "new_model"]

_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)
# Steps that the time of an epoch is taken from, and the seconds after which fewer are enough.
_FIRST_STEPS, _TIMED_STEPS, _ENOUGH = 3, 50, 1.0


@dataclass(frozen=True, eq=False)
class Scored:
    """A scorer that is ready.

    Attributes:
        model: The model, on the device of the run.
        about: What is told about it.
        epoch_seconds: Training time of one epoch on all samples, if it was trained here; else None.
    """

    model: nn.Module
    about: Scorer
    epoch_seconds: float | None


def make_scorer(
    settings: SelectSettings,
    spec: RunSpec,
    task: Task,
    splits: Splits,
    places: Places,
    console: Console,
    together: Together | None = None,
) -> Scored:
    """Train the scorer, go on with its training, or read what was trained before.

    Several processes share every step of the training; the first one writes its files, and all read them.

    Args:
        settings: What was asked for.
        spec: Training of the task.
        task: The task.
        splits: Its data.
        places: Files of the selection.
        console: Where progress goes.
        together: The processes that torchrun started, or None.

    Returns:
        The scorer.
    """
    epochs = settings.warmup_epochs
    if settings.weights is not None:
        path = Path(settings.weights)
        with attempt(together):
            content = _read(path, "name a model.pt that steepest train wrote")
            words = f"the model of {path.name}" + _of_other_task(content, task)
            return Scored(_model(content["state_dict"], spec, task, splits, path), Scorer(words), None)
    if epochs == 0:
        words = f"a new model that was not trained, seed {spec.seed}"
        return Scored(new_model(spec, task, splits), Scorer(words), None)
    short = replace(spec, epochs=epochs)
    words = f"a new model after {count(epochs, 'epoch')} with {label_of(spec.optimizer)}, seed {spec.seed}"
    there = is_there(places.scorer, together)
    with attempt(together):
        kept = _kept(places.scorer, short) if there else None
        if kept is None:
            _refuse_begun(places)
    if kept is None:
        _train(settings, short, places, console, together)
    with attempt(together):
        kept = kept or _read(places.scorer, "begin anew with --fresh")
        seconds = kept["seconds"]
        model = _model(kept["state_dict"], spec, task, splits, places.scorer)
        return Scored(model, Scorer(words + kept["reached"], seconds), seconds / epochs)


def _refuse_begun(places: Places) -> None:
    begun = next((path for path in (places.subset, places.checkpoint) if path.exists()), None)
    if begun is not None:
        raise SelectionError(
            f"{begun} is of a selection whose scorer is not the one that these settings make: use those that it "
            "was begun with, begin anew with --fresh, or name another file with -o"
        )


def _train(
    settings: SelectSettings, spec: RunSpec, places: Places, console: Console, together: Together | None
) -> None:
    with stop_requested() as stop, listener_for(console, every_epoch=True) as listener:
        keeping = Keeping(
            checkpoints=places.scorer_checkpoints, model=places.scorer, every=settings.checkpoint_every, stop=stop
        )
        listener.begin("training the scorer", 1)
        listener.run_started(spec, 1, 1)
        record = execute(spec, lambda point: listener.epoch_done(spec, point), keeping=keeping)
        listener.run_done(spec, record, resumed=False)
    with attempt(together):
        if leads(together):
            _finish(spec, record, places)
        if record.status != "finished":
            raise SelectionError(
                f"the training of the scorer {record.status} ({record.error}): its gradients would say nothing; choose "
                "another --optimizer, or bring a trained model with --weights"
            )
        if stop():  # after the last step
            raise KeyboardInterrupt


def _finish(spec: RunSpec, record: RunRecord, places: Places) -> None:
    """Note with the scorer what it is, and what it cost.

    A continued selection must have the same scorer, and tell the same seconds.
    """
    forget(places.scorer_checkpoints)
    if record.status != "finished":
        places.scorer.unlink(missing_ok=True)
        return
    content = _read(places.scorer, "begin anew with --fresh")
    write_tensors(places.scorer, {**content, "key": spec.key(), "seconds": record.seconds, "reached": _reached(record)})


def _reached(record: RunRecord) -> str:
    """How good the scorer is: the gradients of one that has learnt nothing say nothing."""
    last = record.history[-1].val_metrics
    metric = next((note for note in record.problem.metrics if last.get(note.name) is not None), None)
    return "" if metric is None else f" (validation {metric.label} {number(last[metric.name])})"


def _kept(path: Path, spec: RunSpec) -> dict[str, Any] | None:
    """The scorer, if it is of the same training."""
    content = _read(path, "begin anew with --fresh")
    complete = isinstance(content.get("seconds"), float) and isinstance(content.get("reached"), str)
    return content if content.get("key") == spec.key() and complete else None


def _read(path: Path, remedy: str) -> dict[str, Any]:
    if not path.is_file():
        raise SelectionError(f"there is no model {path}: {remedy}")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except _UNREADABLE as error:
        reason = " ".join(str(error).split())[:160]
        raise SelectionError(f"{path} cannot be read as a model ({reason}): {remedy}") from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise SelectionError(f"{path} holds no state_dict: {remedy}")
    return content


def _of_other_task(content: dict[str, Any], task: Task) -> str:
    trained = content.get("task")
    return f", which was trained on {trained}" if isinstance(trained, str) and trained != task.name else ""


def new_model(spec: RunSpec, task: Task, splits: Splits) -> nn.Module:
    """Make the model that a run begins with; torch's random state stays as it is.

    Args:
        spec: The run.
        task: Its task.
        splits: Its data.

    Returns:
        The model, on the run's device.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(spec.seed)
        return task.model(splits.shape).to(spec.device)


def _model(state: dict[str, Any], spec: RunSpec, task: Task, splits: Splits, path: Path) -> nn.Module:
    model = new_model(spec, task, splits)
    try:
        model.load_state_dict(state)
    except (RuntimeError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())[:240]
        raise SelectionError(
            f"{path} has the weights of another model than that of {task.name}: {reason}; give the --model that it was "
            "trained with, or other weights"
        ) from error
    return model


def epoch_seconds(spec: RunSpec, task: Task, splits: Splits, ranks: Ranks | None = None) -> float:
    """Time some steps of training, where no scorer was trained. Several processes share them as those of a run.

    Args:
        spec: Training of the task.
        task: The task.
        splits: Its data.
        ranks: The processes, or None.

    Returns:
        Seconds of one epoch on all samples, the same on every process.
    """
    entry, train = get_optimizer(spec.optimizer), splits.to(spec.device).train
    model = new_model(spec, task, splits)
    optimizer, step = entry.build(model, spec.options), entry.step(spec.options)
    first = slice(spec.batch_size)
    shared = replica(
        model, entry, ranks, lambda net: task.loss.per_sample(net(train.inputs[first]), train.targets[first]).mean()
    )
    seconds, taken = 0.0, 0
    every = cycle(batches(train, batch_size=spec.batch_size, seed=spec.seed, epoch=1))
    with nullcontext(bool) if ranks is None else stop_requested() as stop:
        for place, (inputs, targets) in enumerate(islice(every, _FIRST_STEPS + _TIMED_STEPS)):
            start = time.perf_counter()
            step(optimizer, shared, task.loss, share(inputs, ranks), share(targets, ranks))
            if spec.device.startswith("cuda"):
                torch.cuda.synchronize()
            passed = _agreed(time.perf_counter() - start, spec, ranks, stop)
            # Libraries set themselves up on first use: the first steps say nothing.
            if place >= _FIRST_STEPS:
                seconds, taken = seconds + passed, taken + 1
            if seconds > _ENOUGH:
                break
    return seconds / taken * (len(train) // spec.batch_size)


def _agreed(seconds: float, spec: RunSpec, ranks: Ranks | None, stop: Callable[[], bool]) -> float:
    """The mean over the processes, which must take the same number of steps and stop before the same one."""
    if ranks is None:
        return seconds
    total = torch.tensor([seconds, stop()], dtype=torch.float64, device=spec.device)
    ranks.sum_([total])
    mean, asked = (total / ranks.size).tolist()
    if asked:
        raise KeyboardInterrupt
    return float(mean)
