"""Settings of the commands: declared once, read from a TOML file, overridden by flags.

The names in a file are the names of the flags, with underscores. `Settings` and its children are the only list of
them: unknown keys and wrong types are found by comparing with these annotations.
"""

import json
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from steepest.errors import InvalidOptionError
from steepest.training.compare import BatchSize, Request
from steepest.training.convert import convert, describe, plain
from steepest.training.errors import ConfigError, UnknownNameError, unknown
from steepest.training.source import Source
from steepest.training.task import Kind, Schedule

__all__ = ["CompareSettings", "Settings", "TrainSettings", "merge", "read_settings"]


@dataclass(frozen=True)
class Settings:
    """What training and comparing have in common.

    Attributes:
        epochs: Epochs per run; None takes the task's own, unless seconds are given.
        budget_seconds: Training seconds per run.
        schedule: Learning rate over the budget; None takes the task's own.
        batch_size: Samples per step, "all" for the whole training split; None takes the task's own.
        data_seed: Seed of the splits.
        device: Torch device.
        threads: Threads of torch on CPU.
        data: Folder of the data sets that are files, or a table of one's own.
        target: Column of the targets, for a table.
        kind: Classification or regression, for a table; None infers it.
        ignore: Columns that are left out, for a table.
        drop_missing: Leave out rows with empty cells, for a table.
        model: Model instead of the task's own.
        out: Folder for what is written.
    """

    epochs: int | None = None
    budget_seconds: float | None = None
    schedule: Schedule | None = None
    batch_size: BatchSize | None = None
    data_seed: int = 0
    device: str = "cpu"
    threads: int = 1
    data: str | None = None
    target: str | None = None
    kind: Kind | None = None
    ignore: tuple[str, ...] = ()
    drop_missing: bool = False
    model: str | None = None
    out: str | None = None

    def to_json(self) -> str:
        """The settings as text that `merge` takes back.

        Returns:
            JSON.
        """
        return json.dumps({item.name: plain(getattr(self, item.name)) for item in fields(self)})

    def sources(self, names: tuple[str, ...]) -> list[Source]:
        """Where tasks come from.

        Args:
            names: Tasks as the user named them.

        Returns:
            One source for each; `data` itself if it is a table and nothing else was named.

        Raises:
            InvalidOptionError: If no task was named, or a table besides one.
        """
        data = self.data
        if data is not None and not Path(data).is_dir() and (not names or Path(data).is_file()):
            if names:
                raise InvalidOptionError(
                    f"--data {data} is no folder, and a task is named besides it ({names[0]}): name tables as tasks, "
                    "or leave the task out"
                )
            names, data = (data,), None
        if not names:
            raise InvalidOptionError(
                "no task was named: give one that `steepest list` shows, or a table of your own as --data FILE"
            )
        return [
            Source(
                name=name,
                data=data,
                target=self.target,
                kind=self.kind,
                ignore=self.ignore,
                drop_missing=self.drop_missing,
                model=self.model,
            )
            for name in names
        ]

    def _plan(
        self,
        tasks: tuple[str, ...],
        optimizers: tuple[str, ...],
        seeds: Sequence[int],
        options: Mapping[str, Mapping[str, object]],
        selections: Sequence[str] = ("none",),
    ) -> Request:
        return Request(
            tasks=self.sources(tasks),
            optimizers=optimizers,
            seeds=seeds,
            epochs=self.epochs,
            seconds=self.budget_seconds,
            options=options,
            schedule=self.schedule,
            batch_sizes=None if self.batch_size is None else [self.batch_size],
            selections=selections,
            data_seed=self.data_seed,
            device=self.device,
            threads=self.threads,
        )


@dataclass(frozen=True)
class TrainSettings(Settings):
    """Settings of `steepest train`.

    Attributes:
        task: The task.
        optimizer: The optimizer.
        options: Its options.
        select: What is selected to train on, as METHOD:FRACTION[:NAME=VALUE...]; none trains on everything.
        seed: Seed of initialisation and data order.
        checkpoint_every: Wall-clock seconds between two checkpoints.
        keep_checkpoints: How many of them stay, the newest ones.
    """

    task: str | None = None
    optimizer: str = "sven"
    options: Mapping[str, object] = field(default_factory=dict)
    select: str = "none"
    seed: int = 0
    checkpoint_every: float = 30.0
    keep_checkpoints: int = 2

    def request(self) -> Request:
        """The run as a comparison of one.

        Returns:
            What to plan.

        Raises:
            InvalidOptionError: If the time between checkpoints is no positive number, or none is to be kept.
        """
        if not 0 <= self.checkpoint_every < float("inf"):
            raise InvalidOptionError(
                f"the seconds between checkpoints are {self.checkpoint_every}: give a finite number, 0 for every step"
            )
        if self.keep_checkpoints < 1:
            raise InvalidOptionError(
                f"the number of checkpoints to keep is {self.keep_checkpoints}: give at least 1, the default is 2"
            )
        names = (self.task,) if self.task is not None else ()
        options = {self.optimizer: self.options} if self.options else {}
        return self._plan(names, (self.optimizer,), [self.seed], options, [self.select])


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Settings of `steepest compare`.

    Attributes:
        tasks: The tasks.
        optimizers: The optimizers.
        options: Options by optimizer.
        select: What is selected to train on, each for every optimizer; none trains on everything.
        batch_sizes: Batch sizes that are compared, each by itself, instead of one.
        seeds: Number of seeds: 0, 1, 2, ...
        tune: Learning rates to try for every optimizer; 0 for none; None tries 5 on tasks without stored ones.
        timeout: Wall-clock seconds after which a run is given up.
        goal: Value that the report times, one for all tasks or one for each; None takes what the reference optimizer
            reaches.
        goal_metric: Metric on the validation split that the goal is a value of; None for the validation loss.
    """

    tasks: tuple[str, ...] = ()
    optimizers: tuple[str, ...] = ("sven", "sgd", "adam", "lbfgs")
    options: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    select: tuple[str, ...] = ("none",)
    batch_sizes: tuple[BatchSize, ...] = ()
    seeds: int = 3
    tune: int | None = None
    timeout: float | None = None
    goal: float | Mapping[str, float] | None = None
    goal_metric: str | None = None

    def request(self) -> Request:
        """The comparison.

        Returns:
            What to plan.

        Raises:
            InvalidOptionError: If the timeout is impossible, or two kinds of batch sizes are given.
        """
        if self.timeout is not None and not 0 < self.timeout < float("inf"):
            raise InvalidOptionError(f"the timeout is {self.timeout}: it must be a finite number above 0")
        plan = self._plan(self.tasks, self.optimizers, range(self.seeds), self.options, self.select)
        if not self.batch_sizes:
            return plan
        if self.batch_size is not None:
            raise InvalidOptionError("batch_size and batch_sizes are both given: drop one of them")
        return replace(plan, batch_sizes=self.batch_sizes)


_Kind = TypeVar("_Kind", bound=Settings)


def merge(kind: type[_Kind], *layers: Mapping[str, object]) -> _Kind:
    """Put settings together; later layers win, None in a layer says nothing.

    Options are merged by name, so that one flag does not throw away a file's table.

    Args:
        kind: Which command's settings.
        *layers: Names and values, from the file to the flags.

    Returns:
        The settings.

    Raises:
        InvalidOptionError: If a value has the wrong type.
        UnknownNameError: If there is no such setting.
    """
    merged: dict[str, object] = {}
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, Mapping) and isinstance(before := merged.get(name), Mapping):
                merged[name] = _merge_options(before, value)
            elif value is not None:
                merged[name] = value
    return kind(**_checked(kind, merged, "setting"))


def _merge_options(before: Mapping[str, object], after: Mapping[str, object]) -> dict[str, object]:
    both = dict(before)
    for name, value in after.items():
        old = both.get(name)
        # A solver's own table has a type: it is replaced as a whole, its keys mean nothing to another solver.
        nested = isinstance(old, Mapping) and isinstance(value, Mapping) and "type" not in {*old, *value}
        both[name] = {**old, **value} if nested else value  # type: ignore[dict-item]
    return both


def read_settings(path: Path, kind: type[Settings]) -> dict[str, object]:
    """Read a TOML file of settings.

    Args:
        path: The file.
        kind: Which command's settings.

    Returns:
        Names and checked values.

    Raises:
        ConfigError: If the file cannot be read, has an unknown key or a value of the wrong type.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path} cannot be read as TOML: {reason}") from error
    try:
        return _checked(kind, content, "key")
    except InvalidOptionError as error:
        raise ConfigError(f"{path}: {error}") from error


def _checked(kind: type[Settings], content: Mapping[str, object], what: str) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    known = {item.name: hints[item.name] for item in fields(kind)}
    checked = {}
    for name, value in content.items():
        if name not in known:
            raise UnknownNameError(unknown(what, name, known))
        fits, checked[name] = convert(value, known[name])
        if not fits:
            raise InvalidOptionError(f"{what} {name!r} is {value!r}: it takes {describe(known[name])}")
    return checked
