"""What the targets of a user's data are: classes or numbers, and why."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steepest.training.errors import DataError
from steepest.training.task import Kind

__all__ = ["Targets", "understand"]

_MOST_INFERRED_CLASSES, _LEAST_ROWS_PER_CLASS = 20, 5
_MOST_CLASSES = 1000
_RARE = 5


@dataclass(frozen=True)
class Targets:
    """Targets that a loss can use.

    Attributes:
        kind: Classification or regression.
        values: Class numbers `[N]`, or float64 `[N, K]`.
        classes: Names of the classes in the order of their numbers; empty for a regression.
        notes: What was inferred and why.
    """

    kind: Kind
    values: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...]


def understand(path: Path, name: str, column: Tensor | Sequence[str], kind: Kind | None) -> Targets:
    """Decide whether targets are classes or numbers, and make them so.

    Text is a classification. Integers with at most 20 distinct values, each in 5 rows on average, are one
    too. All else is a regression.

    Args:
        path: The file, for the messages.
        name: Name of the target column.
        column: float64 `[N]` or `[N, K]`, or text.
        kind: What the user wants; None infers it.

    Returns:
        The targets.

    Raises:
        DataError: If the column cannot be what the user wants, or holds one value only.
    """
    inferred, why = _infer(column)
    chosen = kind or inferred
    notes: tuple[str, ...] = () if kind else (f"target {name!r} {why}: taken as a {inferred} (--kind changes that)",)
    where = f"{path}: target {name!r}"
    if chosen == "classification":
        values, classes = _classes(where, column)
        counts = values.bincount().tolist()
        rare = [f"{label} ({count})" for label, count in zip(classes, counts, strict=True) if count < _RARE]
        if rare:
            notes += (
                f"classes of fewer than {_RARE} rows: {_few(rare)}; a part of the data may hold none of one of them",
            )
        return Targets(chosen, values, classes, notes)
    if not isinstance(column, Tensor):
        raise DataError(
            f"{where} is text, such as {column[0]!r}: a regression needs numbers; use --kind classification"
        )
    flat = column.reshape(len(column), -1)
    constant = (flat == flat[0]).all(dim=0)
    if constant.any():
        raise DataError(f"{where} is {float(flat[0][constant][0]):g} in every row: choose a target that varies")
    return Targets(chosen, flat, (), notes)


def _infer(column: Tensor | Sequence[str]) -> tuple[Kind, str]:
    if not isinstance(column, Tensor):
        return "classification", f"is text with {len(set(column)):,} distinct values"
    if column.ndim > 1 and column[0].numel() > 1:
        return "regression", f"has {column[0].numel()} numbers per row"
    if not _whole(column):
        return "regression", "has fractional values"
    distinct = column.unique().numel()
    found = f"holds whole numbers, {distinct:,} distinct ones in {len(column):,} rows"
    few = distinct <= _MOST_INFERRED_CLASSES and len(column) >= _LEAST_ROWS_PER_CLASS * distinct
    return ("classification" if few else "regression"), found


def _whole(column: Tensor) -> bool:
    return bool((column == column.round()).all())


def _classes(where: str, column: Tensor | Sequence[str]) -> tuple[Tensor, tuple[str, ...]]:
    if isinstance(column, Tensor):
        if column.ndim > 1 and column[0].numel() > 1:
            raise DataError(
                f"{where} has the shape {list(column.shape)}: a classification needs one class number per row; use "
                "--kind regression, or write class numbers instead of one-hot rows"
            )
        if not _whole(column):
            raise DataError(
                f"{where} has fractional values: a classification needs whole numbers or text; use --kind regression"
            )
        distinct, values = column.flatten().unique(return_inverse=True)
        labels = tuple(f"{value:.0f}" for value in distinct.tolist())
    else:
        labels = tuple(sorted(set(column)))
        number = {label: index for index, label in enumerate(labels)}
        values = torch.tensor([number[label] for label in column])
    if len(labels) == 1:
        raise DataError(
            f"{where} is {labels[0]!r} in every row: there is one class and nothing to learn; choose another target"
        )
    if len(labels) > min(_MOST_CLASSES, len(column) / 2):
        remedy = "use --kind regression, or choose another target" if isinstance(column, Tensor) else "choose another"
        raise DataError(
            f"{where} has {len(labels):,} distinct values in {len(column):,} rows, a classification may have "
            f"{_MOST_CLASSES:,} and half as many as rows: {remedy}"
        )
    return values, labels


def _few(names: Sequence[str], limit: int = 10) -> str:
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
