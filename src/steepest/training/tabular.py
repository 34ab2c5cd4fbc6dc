"""A task from a table of the user's: CSV and its relatives, or arrays in an NPZ file."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.training.data import Split, Splits, split_three_ways, standardise
from steepest.training.errors import DataError, UnknownNameError, unknown
from steepest.training.losses import CrossEntropy, SquaredError
from steepest.training.metrics import ACCURACY, R2
from steepest.training.models import hidden
from steepest.training.readers.npz import read_npz
from steepest.training.readers.sheet import Sheet, read_sheet
from steepest.training.readers.table import Column, column_named, read_columns
from steepest.training.targets import Targets, understand
from steepest.training.task import Kind, Task

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["table_task"]

_LEAST_ROWS = 10
_MOST_TEXT_VALUES = 50
_LARGEST = 1e100  # squares of larger numbers leave float64
_WIDTHS = (64, 64)
# Training rows below which a batch size and a number of epochs hold; about 1,000 to 10,000 steps in all.
_PLANS = ((2_000, 32, 40), (20_000, 64, 20))
_LAST_PLAN = (256, 10)


@dataclass(frozen=True)
class _Data:
    inputs: Tensor
    target: Tensor | Sequence[str]
    target_name: str
    notes: tuple[str, ...]
    features: tuple[str, ...] = ()


def table_task(
    path: Path,
    *,
    target: str | None,
    kind: Kind | None = None,
    ignore: tuple[str, ...] = (),
    drop_missing: bool = False,
    name: str | None = None,
    description: str | None = None,
    columns: tuple[str, ...] | None = None,
) -> Task:
    """Make a task of a file.

    Rows are split 60/20/20 by the data seed. Inputs, and the targets of a regression, are standardised by the
    training part. The file is read once, here.

    Args:
        path: CSV, TSV, semicolons or white space (plain or gzip), or NPZ if the name ends so.
        target: Name or position of the target column, or name of the target array.
        kind: Classification or regression; None infers it and says so in the notes.
        ignore: Columns or arrays to leave out.
        drop_missing: Leave out rows with missing cells.
        name: Name of the task; None takes the name of the file.
        description: One line for people; None says what the file holds.
        columns: Names of the columns, instead of those in the file.

    Returns:
        The task.

    Raises:
        DataError: If no task can be made of the file.
    """
    if path.suffix.lower() == ".npz":
        data = _from_npz(path, target, ignore)
    else:
        data = _from_sheet(read_sheet(path, columns), target, ignore, drop_missing=drop_missing)
    rows = len(data.inputs)
    if rows < _LEAST_ROWS:
        raise DataError(f"{path} has {rows} rows to use, a task needs {_LEAST_ROWS} at least: give more rows")
    targets = understand(path, data.target_name, data.target, kind)
    outputs = len(targets.classes) or targets.values.shape[1]
    features = data.inputs[0].numel()
    train_rows = rows - 2 * int(rows * 0.2)
    batch_size, epochs = next(((size, count) for below, size, count in _PLANS if train_rows < below), _LAST_PLAN)
    shape = " x ".join(map(str, data.inputs.shape[1:]))
    summary = (
        f"{path.name}: {rows:,} rows, {shape} input{'s' * (features != 1)}, target {data.target_name!r}; "
        f"MLP {'-'.join(map(str, (features, *_WIDTHS, outputs)))}"
    )
    regression = targets.kind == "regression"
    return Task(
        name=name or _safe_name(path),
        description=description or summary,
        kind=targets.kind,
        load=lambda data_seed: _load(path, data.inputs, targets, data_seed),
        model=hidden(*_WIDTHS),
        loss=SquaredError() if regression else CrossEntropy(),
        metrics=(R2,) if regression else (ACCURACY,),
        batch_size=min(batch_size, train_rows),
        epochs=epochs,
        # Signed residuals are one row per sample: several targets go as losses.
        options={"sven": {"rows": "losses"}} if regression and outputs > 1 else {},
        files=(path,),
        notes=targets.notes + data.notes,
        features=data.features,
        classes=targets.classes,
    )


def _safe_name(path: Path) -> str:
    stem = path.name.removesuffix(".gz")
    stem = stem.rpartition(".")[0] or stem
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem).strip("_") or "table"


def _load(path: Path, inputs: Tensor, targets: Targets, data_seed: int) -> Splits:
    splits = split_three_ways(inputs, targets.values, seed=data_seed)
    if targets.kind == "classification":
        absent = set(range(len(targets.classes))) - set(splits.train.targets.tolist())
        if absent:
            label, count = targets.classes[min(absent)], int((targets.values == min(absent)).sum())
            raise DataError(
                f"{path}: class {label!r} is in {count} of {len(inputs):,} rows, none of them in the training part of "
                f"data seed {data_seed}: use another --data-seed, or give more rows of that class"
            )
    regression = targets.kind == "regression"
    scaled = standardise(splits, targets=regression)
    return Splits(
        *(
            Split(part.inputs.float(), part.targets.float() if regression else part.targets)
            for part in (scaled.train, scaled.val, scaled.test)
        ),
        scaling=scaled.scaling,
    )


def _from_sheet(sheet: Sheet, target: str | None, ignore: tuple[str, ...], *, drop_missing: bool) -> _Data:
    if target is None:
        raise DataError(
            f"{sheet.path} has the columns {', '.join(sheet.names)}: say which one is the target with --target NAME"
        )
    goal = column_named(sheet, target)
    ignored = {column_named(sheet, name) for name in ignore}
    if goal in ignored:
        raise InvalidOptionError(f"column {goal!r} is the target and is ignored too: drop one of the two")
    table = read_columns(sheet, [name for name in sheet.names if name not in ignored], drop_missing=drop_missing)
    if len(table.names) < 2:
        raise DataError(f"{sheet.path} has no column besides the target {goal!r}: give one input column at least")
    notes = [] if sheet.named else [f"{sheet.path.name} has no header line: its columns are called by their positions"]
    if table.dropped:
        notes.append(f"{table.dropped:,} rows with missing cells were left out")
    inputs: list[tuple[str, Tensor]] = []
    constant: list[str] = []
    for name, column in zip(table.names, table.columns, strict=True):
        if name == goal:
            answers = column
            continue
        if len(set(column.tolist() if isinstance(column, Tensor) else column)) == 1:
            constant.append(name)
        inputs += _features(sheet.path, name, column, notes)
    if constant:
        notes.append(f"constant in every row, kept all the same: {', '.join(constant)}")
    features, values = zip(*inputs, strict=True)
    return _Data(torch.stack(values, dim=1), answers, goal, tuple(notes), features)


def _features(path: Path, name: str, column: Column, notes: list[str]) -> list[tuple[str, Tensor]]:
    if isinstance(column, Tensor):
        if column.abs().max() > _LARGEST:
            raise DataError(
                f"{path}: column {name!r} reaches {float(column.abs().max()):g}, above {_LARGEST:g}: its scale cannot "
                f"be computed; rescale it, or leave it out with --ignore {name}"
            )
        return [(name, column)]
    values = sorted(set(column))
    if len(values) > _MOST_TEXT_VALUES:
        raise DataError(
            f"{path}: column {name!r} is text with {len(values):,} distinct values, such as {values[0]!r}; up to "
            f"{_MOST_TEXT_VALUES} become one input each: leave it out with --ignore {name}"
        )
    notes.append(f"column {name!r} is text: one input of 0 or 1 for each of its {len(values)} values")
    return [(f"{name}={value}", torch.tensor([cell == value for cell in column]).double()) for value in values]


def _from_npz(path: Path, target: str | None, ignore: tuple[str, ...]) -> _Data:
    arrays = read_npz(path)
    listed = ", ".join(f"{name} {list(array.shape)}" for name, array in arrays.items())
    if target is None:
        raise DataError(f"{path} holds the arrays {listed}: say which one holds the targets with --target NAME")
    for name in (target, *ignore):
        if name not in arrays:
            raise UnknownNameError(unknown(f"array of {path}", name, arrays))
    if target in ignore:
        raise InvalidOptionError(f"array {target!r} is the target and is ignored too: drop one of the two")
    goal = arrays[target]
    rows = goal.shape[:1]
    usable = [
        name for name, array in arrays.items() if name != target and name not in ignore and array.shape[:1] == rows
    ]
    if not rows or len(usable) != 1:
        raise DataError(
            f"{path} holds {listed}: needed are the target {target!r} and one array with as many rows, found "
            f"{', '.join(usable) or 'none'}; leave the others out with --ignore NAME"
        )
    unused = [name for name in arrays if name not in {target, usable[0], *ignore}]
    notes = (f"arrays with other numbers of rows were left out: {', '.join(unused)}",) if unused else ()
    inputs = _numbers(path, usable[0], arrays[usable[0]]).float()
    if not bool(inputs.isfinite().all()):
        raise DataError(f"{path}: array {usable[0]!r} holds numbers beyond float32: rescale it")
    if inputs.ndim == 1:
        inputs = inputs.unsqueeze(1)
    if goal.dtype.kind == "U" and goal.ndim == 1:
        return _Data(inputs, goal.tolist(), target, notes)
    return _Data(inputs, _numbers(path, target, goal), target, notes)


def _numbers(path: Path, name: str, array: "NDArray[Any]") -> Tensor:
    import numpy as np

    if array.dtype.kind not in "biuf" or array.size == 0:
        raise DataError(
            f"{path}: array {name!r} is {array.dtype} of shape {list(array.shape)}: give numbers, at least one"
        )
    finite = np.isfinite(array)
    if not finite.all():
        place = [int(index) for index in np.argwhere(~finite)[0]]
        raise DataError(
            f"{path}: array {name!r} holds {array[tuple(place)]} at {place}, and {int((~finite).sum()):,} such numbers "
            "in all: correct them or leave these rows out"
        )
    # A copy in a type that torch knows: files may hold unsigned or big-endian numbers.
    return torch.from_numpy(array.astype("float64" if array.ndim < 3 else "float32"))
