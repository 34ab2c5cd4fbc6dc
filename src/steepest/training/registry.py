"""The registries: every module of `tasks/` and `optimizers/` is one entry or more.

A module lists its entries in `ENTRIES`. A new task or optimizer is one new file, and nothing else has to
be kept in step.
"""

import importlib
import pkgutil
from functools import cache
from typing import Protocol, TypeVar

from steepest.training.errors import UnknownNameError, unknown
from steepest.training.optimizer import OptimizerEntry
from steepest.training.task import FileTask, Task

__all__ = ["get_optimizer", "optimizers", "tasks"]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Entry = TypeVar("_Entry", bound=_Named)


def _collect(package_name: str, kinds: tuple[type[_Entry], ...]) -> dict[str, _Entry]:
    package = importlib.import_module(package_name)
    entries: dict[str, _Entry] = {}
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package_name}."):
        module = importlib.import_module(module_info.name)
        for entry in module.ENTRIES:
            if not isinstance(entry, kinds) or entry.name in entries:
                raise TypeError(f"{module_info.name} lists {entry!r}, which is no new {kinds[0].__name__}")
            entries[entry.name] = entry
    return entries


@cache
def tasks() -> dict[str, Task | FileTask]:
    """All tasks by name.

    Returns:
        The registry; treat it as read-only.
    """
    return _collect("steepest.training.tasks", (Task, FileTask))


@cache
def optimizers() -> dict[str, OptimizerEntry]:
    """All optimizers by name.

    Returns:
        The registry; treat it as read-only.
    """
    return _collect("steepest.training.optimizers", (OptimizerEntry,))


def get_optimizer(name: str) -> OptimizerEntry:
    """Look up an optimizer; an unknown name is told with the nearest one."""
    if name not in optimizers():
        raise UnknownNameError(unknown("optimizer", name, optimizers()))
    return optimizers()[name]
