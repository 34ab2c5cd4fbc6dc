"""Rows of text cells from CSV and its relatives: delimiter, header, line numbers."""

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from steepest.training.errors import DataError
from steepest.training.readers.files import read_bytes

__all__ = ["Sheet", "is_missing", "is_number", "read_sheet"]

_DELIMITERS = (",", "\t", ";", " ")  # in order of preference; the last stands for any white space
_SAMPLE = 50
_MISSING = frozenset({"", "nan", "na", "n/a", "null", "?"})
_COMMA_NUMBER = re.compile(r"[+-]?\d+(,\d+)?(e[+-]?\d+)?", re.IGNORECASE)
_WIDE_TEXT = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Sheet:
    """Text cells in rows of equal length.

    Attributes:
        path: The file.
        names: Names of the columns; "1", "2", ... where the file has no header.
        rows: The cells, stripped, without the header.
        lines: For each row the line of the file on which it begins, counted from 1.
        named: Whether the names come from a header line or from the caller.
    """

    path: Path
    names: tuple[str, ...]
    rows: list[list[str]]
    lines: list[int]
    named: bool


def is_missing(cell: str) -> bool:
    """Whether a cell of a numeric column stands for a missing number."""
    return cell.lower() in _MISSING


def is_number(cell: str) -> bool:
    """Whether a cell is a number; Python's `1_000` is none."""
    try:
        float(cell)
    except ValueError:
        return False
    return "_" not in cell


def read_sheet(path: Path, names: tuple[str, ...] | None = None) -> Sheet:
    """Read CSV, TSV, semicolons or white space, plain or gzip.

    The delimiter is the one that cuts the first lines into equally many cells. The first row is a header if
    it has text above numbers, or no number at all.

    Args:
        path: The file.
        names: Names to use, unless the header has the same ones in another order.

    Returns:
        The cells.

    Raises:
        DataError: If it is empty, binary, not UTF-8, ragged, or has a column name twice.
    """
    text = _decode(path, read_bytes(path))
    delimiter = _delimiter(text)
    numbered = list(_rows(path, text, delimiter))
    if not numbered:
        raise DataError(f"{path} is empty: give a file with one row per sample")
    lines, rows = [line for line, _ in numbered], [row for _, row in numbered]
    _check_widths(path, rows, lines)
    header = _has_header(rows)
    if header and len(rows) == 1:
        raise DataError(f"{path} has one line with the column names and no row below it: give a file with rows")
    width = len(rows[0])
    if names is not None and len(names) != width:
        raise DataError(f"{path} has {width} columns, this data set has {len(names)}: give the original file")
    first = rows[0] if header else [""] * width
    own = tuple(cell or str(position) for position, cell in enumerate(first, start=1))
    # A header with the same names in another order knows better than the caller.
    found = own if names is None or set(own) == set(names) else names
    double = [name for name, count in Counter(found).items() if count > 1]
    if double:
        raise DataError(f"{path} has more than one column called {double[0]!r}: give every column a name of its own")
    return Sheet(path, found, rows[1:] if header else rows, lines[1:] if header else lines, header or names is not None)


def _decode(path: Path, data: bytes) -> str:
    remedy = "give a text file, or an NPZ file whose name ends in .npz"
    if data.startswith(_WIDE_TEXT):
        raise DataError(f"{path} is UTF-16 text: save it as UTF-8")
    if b"\0" in data or data.startswith((b"PK\x03\x04", b"PAR1", b"%PDF")):
        what = "a zip archive (a spreadsheet program writes such files)" if data.startswith(b"PK") else "a binary file"
        raise DataError(f"{path} is {what}, not text with one row per line: save it as CSV; {remedy}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec counts after the byte order mark it has taken off.
        line = error.object[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path} is not UTF-8: line {line} has the byte 0x{error.object[error.start]:02x}; save it as UTF-8"
        ) from error


def _rows(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    # newline="": the csv module wants the line ends as they are, inside quotes too.
    lines: Iterator[str] = io.StringIO(text, newline="")
    if delimiter == " ":
        lines = (" ".join(line.split()) for line in lines)
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)
    before = 0
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}: line {before + 1} cannot be cut into cells ({error}): correct its quotes"
            ) from error
        if row is None:
            return
        cells = [cell.strip() for cell in row]
        if any(cells):
            yield before + 1, cells
        before = reader.line_num


def _delimiter(text: str) -> str:
    sample = [line for line in text[:1_000_000].splitlines() if line.strip()][:_SAMPLE]
    best, chosen = 0.0, ","
    for delimiter in _DELIMITERS:
        split = [_cut(line, delimiter) for line in sample]
        width, agreeing = Counter(map(len, split)).most_common(1)[0] if split else (1, 0)
        if width < 2:
            continue
        cells = [cell for row in split for cell in row]
        numeric = sum(map(_looks_numeric, cells)) / len(cells)
        # Cells that are numbers speak for a delimiter: "1,5;2,5" is cut at the semicolon.
        score = agreeing / len(sample) * (1 + numeric)
        if score > best:
            best, chosen = score, delimiter
    return chosen


def _cut(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        line = " ".join(line.split())
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))]
    except csv.Error:
        return [line]


def _looks_numeric(cell: str) -> bool:
    # "1,5" is refused as a number later on; it is no name of a column and no text either.
    return is_number(cell) or _COMMA_NUMBER.fullmatch(cell) is not None


def _check_widths(path: Path, rows: list[list[str]], lines: list[int]) -> None:
    width = Counter(map(len, rows)).most_common(1)[0][0]
    for line, row in zip(lines, rows, strict=True):
        if len(row) != width:
            others = "the other line has" if len(rows) == 2 else "the others have"
            raise DataError(
                f"{path}: line {line} has {len(row)} cell{'s' * (len(row) != 1)}, {others} {width}: correct that line, "
                "or put cells that hold the delimiter in double quotes"
            )


def _has_header(rows: list[list[str]]) -> bool:
    texts = [not _looks_numeric(cell) and not is_missing(cell) for cell in rows[0]]
    if not any(texts):
        return False
    if not any(map(_looks_numeric, rows[0])):
        return True
    for position, text in enumerate(texts):
        below = [row[position] for row in rows[1 : 1 + _SAMPLE] if not is_missing(row[position])]
        if text and below and 2 * sum(map(_looks_numeric, below)) > len(below):
            return True
    return False
