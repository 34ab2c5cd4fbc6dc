"""Where a task comes from: the registry, files of known data sets, a table of the user's, or the user's code."""

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from steepest.errors import InvalidOptionError
from steepest.training.data import Shape
from steepest.training.data_folder import data_folder
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.models import MODELS, build_with
from steepest.training.registry import tasks
from steepest.training.tabular import table_task
from steepest.training.task import FileTask, Kind, Task
from steepest.training.user_code import code_file, is_reference, load_attribute

__all__ = ["Source", "fingerprinted", "resolve"]

_TABLE_SUFFIXES = {".csv", ".tsv", ".txt", ".dat", ".data", ".npz", ".gz"}


@dataclass(frozen=True)
class Source:
    """A task in words that another process can follow.

    Attributes:
        name: A registry name, `module:attribute` or `file.py:attribute` of a `Task` (or of a function that makes
            one), or a table as CSV or NPZ.
        data: Folder of the data sets, for registry tasks that need files; None takes `STEEPEST_DATA`.
        target: Column of the targets, for a table.
        kind: Classification or regression, for a table; None infers it.
        ignore: Columns that are left out, for a table.
        drop_missing: Whether rows with empty cells are left out, for a table.
        model: A model instead of the task's own, such as `mlp:64,64`, or `module:attribute`.
        digest: Hash of files and user code, see `fingerprinted`.
    """

    name: str
    data: str | None = None
    target: str | None = None
    kind: Kind | None = None
    ignore: tuple[str, ...] = ()
    drop_missing: bool = False
    model: str | None = None
    digest: str = ""

    def identity(self) -> dict[str, object]:
        """What decides the numbers of a run: contents, not places.

        Returns:
            Names and values, ready for JSON.
        """
        placed = {"name", "data"} if self.digest else {"data"}
        return {name: value for name, value in asdict(self).items() if name not in placed}


def resolve(source: Source) -> Task:
    """Find the task.

    Args:
        source: Where it comes from.

    Returns:
        The task.

    Raises:
        UnknownNameError: If there is no such task.
        InvalidOptionError: If a setting does not go with this kind of task.
    """
    entry = tasks().get(source.name)
    if entry is None and not Path(source.name).exists() and is_reference(source.name):
        entry = _user_task(source.name)
    if entry is None and _is_table(source.name):
        task = table_task(
            Path(source.name),
            target=source.target,
            kind=source.kind,
            ignore=source.ignore,
            drop_missing=source.drop_missing,
        )
    elif entry is None:
        hint = "; a table of your own is named by its file, as in data.csv, a task of your own by module:attribute"
        raise UnknownNameError(unknown("task", source.name, tasks()) + hint)
    else:
        _refuse_table_settings(source)
        task = entry.at(data_folder(source.data, entry)) if isinstance(entry, FileTask) else entry
    if source.model is None:
        return task
    chosen = task.options_source and f"{task.options_source} (all of it for the task's own model)"
    description = f"{task.description}; here with the model {source.model}"
    return replace(task, model=_model(source.model), description=description, options_source=chosen)


def fingerprinted(source: Source, task: Task) -> Source:
    """Add the hash of the task's files and of the user's code: another content is another run.

    Args:
        source: A source.
        task: Its task.

    Returns:
        The source with its digest, empty where nothing but this library decides the task.
    """
    code = [code_file(name) for name in (source.name, source.model or "") if _is_user_code(name)]
    files = [*task.files, *(file for file in code if file is not None)]
    if not files:
        return replace(source, digest="")
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return replace(source, digest=digest.hexdigest()[:16])


def _is_user_code(name: str) -> bool:
    return is_reference(name) and name not in tasks() and name.partition(":")[0] not in MODELS


def _is_table(name: str) -> bool:
    path = Path(name)
    return path.suffix.lower() in _TABLE_SUFFIXES or path.is_file()


def _refuse_table_settings(source: Source) -> None:
    for flag, value in (
        ("--target", source.target),
        ("--kind", source.kind),
        ("--ignore", source.ignore),
        ("--drop-missing", source.drop_missing),
    ):
        if value:
            raise InvalidOptionError(f"{flag} is for a table of your own, and {source.name} is none: drop it")


def _user_task(reference: str) -> Task:
    found = load_attribute(reference)
    if not isinstance(found, Task) and callable(found):
        found = found()
    if not isinstance(found, Task):
        raise InvalidOptionError(
            f"{reference} is {type(found).__name__}: name a steepest.training.task.Task or a function without "
            "arguments that returns one"
        )
    return found


def _model(text: str) -> Callable[[Shape], nn.Module]:
    name, _, arguments = text.partition(":")
    if name in MODELS:
        return MODELS[name](*_widths(text, arguments)) if arguments else MODELS[name]()
    if not is_reference(text):
        raise UnknownNameError(unknown("model", name, MODELS) + "; one of your own is named by module:attribute")
    constructor: Any = load_attribute(text)
    return lambda shape: build_with(constructor, shape, text)


def _widths(text: str, arguments: str) -> list[int]:
    try:
        widths = [int(part) for part in arguments.split(",")]
    except ValueError:
        widths = []
    if not widths or min(widths) < 1:
        raise InvalidOptionError(f"model {text!r}: give whole numbers above 0, separated by commas, as in mlp:64,64")
    return widths
