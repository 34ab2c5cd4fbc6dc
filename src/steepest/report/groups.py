"""Which records may be compared: cells of equal conditions, in them a row per optimizer, options and selection."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from steepest.report.words import flat_options, short
from steepest.training.records import Problem, RunRecord
from steepest.training.registry import optimizers
from steepest.training.select_text import selection_label

__all__ = ["Cell", "Row", "Study", "group", "label_of", "studies"]


@dataclass(frozen=True)
class Row:
    """The runs of one optimizer with the same options, on the same selection of the data.

    Attributes:
        optimizer: Name of the optimizer.
        label: Name for people, with the options that tell it from other rows of this optimizer.
        select: What they selected to train on, None for everything.
        options: Its options, as JSON.
        records: Its runs, by seed.
    """

    optimizer: str
    label: str
    select: str | None
    options: Mapping[str, object]
    records: tuple[RunRecord, ...]

    @property
    def finished(self) -> tuple[RunRecord, ...]:
        """The runs that finished."""
        return tuple(record for record in self.records if record.status == "finished")

    @property
    def unfinished(self) -> tuple[RunRecord, ...]:
        """The runs that did not."""
        return tuple(record for record in self.records if record.status != "finished")


@dataclass(frozen=True)
class Cell:
    """Runs on one problem under the same conditions: only they may be compared.

    Attributes:
        task: Name of the task.
        variant: What tells it from other cells of the task, empty if it is the only one.
        stem: Name for its files.
        problem: What the task is.
        rows: In the order of the records.
    """

    task: str
    variant: str
    stem: str
    problem: Problem
    rows: tuple[Row, ...]

    @property
    def records(self) -> tuple[RunRecord, ...]:
        """All its runs."""
        return tuple(record for row in self.rows for record in row.records)

    @property
    def title(self) -> str:
        """Task and variant."""
        return f"{self.task} ({self.variant})" if self.variant else self.task


@dataclass(frozen=True)
class Study:
    """Cells that differ in nothing but the batch size: they may be compared across it.

    Attributes:
        task: Name of the task.
        variant: What tells it from other studies of the task, empty if it is the only one.
        stem: Name for its files.
        cells: By batch size.
    """

    task: str
    variant: str
    stem: str
    cells: tuple[Cell, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The batch sizes, in the order of the cells."""
        return tuple(cell.records[0].batch_size for cell in self.cells)


# Everything that must be equal, in the words of a heading.
_CONDITIONS: Mapping[str, Callable[[RunRecord], object]] = {
    "data": lambda record: record.problem.description,
    "kind": lambda record: record.problem.kind,
    "loss": lambda record: record.problem.loss,
    "metrics": lambda record: ", ".join(metric.label for metric in record.problem.metrics),
    "notes": lambda record: "; ".join(record.problem.notes),
    "model": lambda record: record.problem.model or "of the task",
    "contents": lambda record: record.problem.digest[:8],
    "data seed": lambda record: record.data_seed,
    "epochs": lambda record: record.epochs,
    "seconds": lambda record: record.budget_seconds,
    "schedule": lambda record: record.schedule,
    "batch": lambda record: record.batch_size,
    "device": lambda record: record.environment.get("device"),
    "threads": lambda record: record.environment.get("threads"),
    "torch": lambda record: record.environment.get("torch"),
    "steepest": lambda record: record.environment.get("steepest"),
}


def label_of(optimizer: str, select: str | None = None) -> str:
    """Name of an optimizer for people, and of what it is trained on.

    Args:
        optimizer: Its name in the records; one that this version does not know stands for itself.
        select: What is selected to train on, None for everything.

    Returns:
        The label.
    """
    entry = optimizers().get(optimizer)
    name = optimizer if entry is None else entry.label
    return name if select is None else f"{name}, {selection_label(select)}"


def group(records: Sequence[RunRecord]) -> list[Cell]:
    """Sort records into cells and rows.

    Args:
        records: Records of one comparison or of several.

    Returns:
        One cell per problem and conditions, in the order of the records.
    """
    found: dict[tuple[object, ...], list[RunRecord]] = {}
    for record in records:
        found.setdefault((record.task, record.problem, *_conditions(record).values()), []).append(record)
    return [_cell(runs, list(found.values())) for runs in found.values()]


def _conditions(record: RunRecord) -> dict[str, object]:
    return {name: read(record) for name, read in _CONDITIONS.items()}


def _cell(runs: Sequence[RunRecord], cells: Sequence[Sequence[RunRecord]]) -> Cell:
    first = runs[0]
    rivals = [other for other in cells if other[0].task == first.task]
    variant = _variant(first, [other[0] for other in rivals])
    stem = _stem(first.task)
    if len(rivals) > 1:
        stem += f"-{next(place for place, other in enumerate(rivals, start=1) if other is runs)}"
    return Cell(first.task, variant, stem, first.problem, _rows(runs))


def studies(cells: Sequence[Cell]) -> list[Study]:
    """Find what can be compared across batch sizes.

    Args:
        cells: Cells of one comparison or of several.

    Returns:
        One study for every two or more cells that differ in their batch sizes alone, in the order of the cells.
    """
    found: dict[tuple[object, ...], list[Cell]] = {}
    for cell in cells:
        first = cell.records[0]
        same = [value for name, value in _conditions(first).items() if name != "batch"]
        found.setdefault((cell.task, cell.problem, *same), []).append(cell)
    families = [family for family in found.values() if len(family) > 1]
    return [_study(family, families) for family in families]


def _study(family: Sequence[Cell], families: Sequence[Sequence[Cell]]) -> Study:
    first, ordered = family[0], sorted(family, key=lambda cell: cell.records[0].batch_size)
    rivals = [other for other in families if other[0].task == first.task]
    variant = _variant(first.records[0], [other[0].records[0] for other in rivals], leaving_out="batch")
    stem = f"{_stem(first.task)}-batch_sizes"
    if len(rivals) > 1:
        stem += f"-{next(place for place, other in enumerate(rivals, start=1) if other is family)}"
    return Study(first.task, variant, stem, tuple(ordered))


def _variant(mine: RunRecord, rivals: Sequence[RunRecord], *, leaving_out: str = "") -> str:
    """The conditions in which a cell differs from others of its task."""
    conditions, own = [_conditions(rival) for rival in rivals], _conditions(mine)
    differing = [name for name in own if len({str(other[name]) for other in conditions}) > 1 and name != leaving_out]
    return ", ".join(f"{name} {_value(own[name])}" for name in differing)


def _stem(task: str) -> str:
    return re.sub(r"[^\w.-]+", "_", task).strip(".") or "task"


def _value(value: object) -> str:
    return short(value) if isinstance(value, float) else str("none" if value in {None, ""} else value)


def _rows(runs: Sequence[RunRecord]) -> tuple[Row, ...]:
    found: dict[tuple[str, str | None, str], list[RunRecord]] = {}
    for record in runs:
        options = json.dumps(record.options, sort_keys=True)
        found.setdefault((record.optimizer, record.select, options), []).append(record)
    rows = []
    for same in found.values():
        first = same[0]
        rivals = [other[0].options for other in found.values() if other[0].optimizer == first.optimizer]
        label = " ".join([label_of(first.optimizer, first.select), _difference(first.options, rivals)]).strip()
        seeded = tuple(sorted(same, key=lambda record: record.seed))
        rows.append(Row(first.optimizer, label, first.select, first.options, seeded))
    return tuple(rows)


def _difference(options: Mapping[str, object], rivals: Sequence[Mapping[str, object]]) -> str:
    """The options in which the rows of one optimizer differ."""
    mine, flat = flat_options(options), [flat_options(rival) for rival in rivals]
    names = list(dict.fromkeys(name for rival in flat for name in rival))
    differing = [name for name in names if len({rival.get(name) for rival in flat}) > 1]
    # An option inside of another is there only if that one is: its absence says nothing new.
    told = [name for name in differing if name in mine or "." not in name]
    return ", ".join(f"{name}={mine.get(name, 'default')}" for name in told)
