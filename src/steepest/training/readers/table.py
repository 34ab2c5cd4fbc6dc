"""Columns of a table: numbers or text, with every cell accounted for."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from steepest.training.errors import DataError, UnknownNameError, unknown
from steepest.training.readers.sheet import Sheet, is_missing, is_number, read_sheet

__all__ = ["Column", "Table", "column_named", "read_columns", "read_table"]

Column = Tensor | tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Columns of equal length without missing and without infinite cells.

    Attributes:
        path: The file.
        names: Name of every column.
        columns: float64 `[rows]`, or text.
        rows: Number of rows.
        dropped: Rows left out because a cell was missing.
    """

    path: Path
    names: tuple[str, ...]
    columns: tuple[Column, ...]
    rows: int
    dropped: int = 0


def read_table(
    path: Path, *, names: tuple[str, ...] | None = None, ignore: Collection[str] = (), drop_missing: bool = False
) -> Table:
    """Read a table as columns.

    Args:
        path: CSV, TSV, semicolons or white space, plain or gzip.
        names: Names to use instead of those in the file.
        ignore: Columns that are left out, by name or position.
        drop_missing: Leave out the rows with a missing cell instead of refusing the file.

    Returns:
        The columns that are not ignored.
    """
    sheet = read_sheet(path, names)
    ignored = {column_named(sheet, column) for column in ignore}
    return read_columns(sheet, [name for name in sheet.names if name not in ignored], drop_missing=drop_missing)


def column_named(sheet: Sheet, found: str) -> str:
    """Find a column by its name, or else by its position.

    Args:
        sheet: The table.
        found: A name, or a position counted from 1, or from -1 backwards.

    Returns:
        Its name.

    Raises:
        UnknownNameError: If there is no such column.
    """
    if found in sheet.names:
        return found
    try:
        position = int(found)
    except ValueError:
        position = 0
    if 1 <= abs(position) <= len(sheet.names):
        return sheet.names[position - 1 if position > 0 else position]
    raise UnknownNameError(unknown(f"column of {sheet.path}", found, sheet.names))


def read_columns(sheet: Sheet, names: Sequence[str], *, drop_missing: bool = False) -> Table:
    """Turn some columns of a sheet into numbers or text.

    A column is numeric if more than half of its cells that are not empty are numbers.

    Args:
        sheet: The cells.
        names: The columns to read.
        drop_missing: Leave out the rows with a missing cell instead of refusing the file.

    Returns:
        The columns.

    Raises:
        DataError: If a cell is missing, infinite, or text among numbers.
    """
    positions = [sheet.names.index(name) for name in names]
    columns = [_column(sheet, name, position) for name, position in zip(names, positions, strict=True)]
    missing = torch.zeros(len(sheet.rows), dtype=torch.bool)
    for column in columns:
        missing |= _missing(column)
    dropped = int(missing.sum())
    if dropped and not drop_missing:
        raise DataError(_missing_message(sheet, names, columns, missing))
    if dropped == len(sheet.rows):
        raise DataError(
            f"{sheet.path}: every row has a missing cell, so none is left with --drop-missing; leave out the columns "
            "with many missing cells by --ignore"
        )
    if dropped:
        kept = (~missing).nonzero().flatten().tolist()
        columns = [c[~missing] if isinstance(c, Tensor) else tuple(c[row] for row in kept) for c in columns]
    return Table(sheet.path, tuple(names), tuple(columns), len(sheet.rows) - dropped, dropped)


def _column(sheet: Sheet, name: str, position: int) -> Column:
    cells = [row[position] for row in sheet.rows]
    try:
        # float alone is fast and takes "nan"; what it takes besides numbers (1_000) is looked at below.
        values = [float(cell) for cell in cells]
        plain = not any("_" in cell for cell in cells)
    except ValueError:
        plain = False
    if not plain:
        given = [cell for cell in cells if not is_missing(cell)]
        numbers = sum(map(is_number, given))
        if given and 2 * numbers <= len(given):
            _refuse_comma_numbers(sheet, name, cells)
            return tuple(cells)
        values = [_value(sheet, name, row, cell) for row, cell in enumerate(cells)]
    column = torch.tensor(values, dtype=torch.float64)
    if column.isinf().any():
        row = int(column.isinf().nonzero()[0, 0])
        raise DataError(
            f"{sheet.path}: line {sheet.lines[row]}, column {name!r} holds {cells[row]!r}, which is infinite as a "
            f"float64: correct it, or leave the column out with --ignore {name}"
        )
    if column.isnan().all():
        raise DataError(f"{sheet.path}: column {name!r} is empty in every row: leave it out with --ignore {name}")
    return column


def _value(sheet: Sheet, name: str, row: int, cell: str) -> float:
    if is_missing(cell):
        return math.nan
    if is_number(cell):
        return float(cell)
    raise DataError(
        f"{sheet.path}: line {sheet.lines[row]}, column {name!r} holds {cell!r}, most others of its cells are numbers: "
        f"correct it, or leave the column out with --ignore {name}"
    )


def _refuse_comma_numbers(sheet: Sheet, name: str, cells: list[str]) -> None:
    given = [(row, cell) for row, cell in enumerate(cells) if cell]
    with_comma = [(row, cell) for row, cell in given if cell.count(",") == 1 and is_number(cell.replace(",", "."))]
    if 2 * len(with_comma) > len(given):
        row, cell = with_comma[0]
        raise DataError(
            f"{sheet.path}: line {sheet.lines[row]}, column {name!r} holds {cell!r}, a number with a comma: write "
            "numbers with a point and without separators of thousands"
        )


def _missing(column: Column) -> Tensor:
    if isinstance(column, Tensor):
        return column.isnan()
    return torch.tensor([not cell for cell in column])


def _missing_message(sheet: Sheet, names: Sequence[str], columns: list[Column], missing: Tensor) -> str:
    row = int(missing.nonzero()[0, 0])
    name = next(name for name, column in zip(names, columns, strict=True) if bool(_missing(column)[row]))
    cell = sheet.rows[row][sheet.names.index(name)]
    count = int(missing.sum())
    return (
        f"{sheet.path}: line {sheet.lines[row]}, column {name!r} is {f'{cell!r}' if cell else 'empty'}; {count:,} of "
        f"{len(missing):,} rows have a missing cell: leave these rows out with --drop-missing, or the column with "
        f"--ignore {name}"
    )
