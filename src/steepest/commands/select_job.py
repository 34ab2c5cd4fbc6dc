"""What a call of `steepest select` works on: settings, task and data, files, and the processes that share it."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from rich.console import Console
from torch import Tensor

from steepest.commands.select_settings import Places, SelectSettings
from steepest.commands.select_shared import leads
from steepest.selection.method import Method
from steepest.selection.together import Together
from steepest.training.data import Split, Splits
from steepest.training.source import resolve
from steepest.training.spec import RunSpec
from steepest.training.task import Task

__all__ = ["Job", "make_job", "pair"]


@dataclass(frozen=True, eq=False)
class Job:
    """What a call of the command works on, and with whom.

    Attributes:
        settings: What was asked for.
        spec: Training of the task: the scorer's is the beginning of it, the check's all of it.
        task: The task.
        splits: Its data.
        method: How to choose.
        places: Where the files are.
        errors: Where progress goes; of several processes the first one's is heard.
        together: The processes that torchrun started, or None.
        let_through: A context in which signals raise KeyboardInterrupt at once.
    """

    settings: SelectSettings
    spec: RunSpec
    task: Task
    splits: Splits
    method: Method
    places: Places
    errors: Console
    together: Together | None
    let_through: Callable[[], AbstractContextManager[None]]


def make_job(
    settings: SelectSettings, together: Together | None, let_through: Callable[[], AbstractContextManager[None]]
) -> Job:
    """Check what was asked for, and load the data.

    Args:
        settings: What was asked for.
        together: The processes that torchrun started, or None.
        let_through: A context in which signals raise KeyboardInterrupt at once.

    Returns:
        The job.
    """
    settings.validate()
    method, spec = settings.make_method(), settings.plan()
    task = resolve(spec.origin())
    splits = task.load(spec.data_seed)
    settings.check_amounts(spec, len(splits.train))
    return Job(
        settings=settings,
        spec=spec,
        task=task,
        splits=splits,
        method=method,
        places=Places.of(settings, task.name),
        errors=Console(stderr=True, markup=False, highlight=False, quiet=not leads(together)),
        together=together,
        let_through=let_through,
    )


def pair(split: Split) -> tuple[Tensor, Tensor]:
    """A split as `select_subset` takes it."""
    return split.inputs, split.targets
