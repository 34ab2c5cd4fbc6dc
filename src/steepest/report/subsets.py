"""What the runs of a cell selected to train on, as a table."""

from collections.abc import Callable, Sequence
from statistics import fmean

from steepest.report.grids import Entry, Grid
from steepest.report.groups import Cell, Row
from steepest.report.words import count, number
from steepest.training.records import RunRecord, Selected

__all__ = ["SELECTION_NOTE", "subset_grid"]

SELECTION_NOTE = (
    "A subset is trained on with as many steps as all of the data would have; what selecting takes, and the epochs of "
    "all data before it, are in the seconds. Learning rates that were tuned here were tuned on all of the data."
)


def subset_grid(cell: Cell) -> Grid | None:
    """What was selected, by row.

    Args:
        cell: Runs that may be compared.

    Returns:
        The table, None where every run trained on everything.
    """
    rows = [row for row in cell.rows if row.select is not None]
    if not rows:
        return None
    wrong = any(_wrong(row) is not None for row in rows)
    titles = (
        "optimizer",
        "selection",
        "samples",
        "selected",
        "selecting",
        *(["wrong labels"] if wrong else []),
        "notes",
    )
    table = [
        (
            Entry(row.label),
            Entry(row.select or ""),
            Entry(*_samples(row)),
            Entry(_times(row)),
            Entry(_seconds(row)),
            *([Entry(*_wrong_words(row))] if wrong else []),
            Entry(_notes(row)),
        )
        for row in rows
    ]
    return Grid(titles, tuple(table), frozenset({0, 1, 3, len(titles) - 1}), "Selections")


def _mean(records: Sequence[RunRecord], read: Callable[[RunRecord], float | None]) -> float | None:
    found = [value for record in records if (value := read(record)) is not None]
    return fmean(found) if found else None


def _samples(row: Row) -> tuple[str, str]:
    kept = _mean(row.records, lambda record: record.selections[-1].kept if record.selections else None)
    whole = _mean(row.records, lambda record: record.samples[0] if record.samples else None)
    return "-" if kept is None else f"{kept:,.0f}", "" if whole is None else f"of {whole:,.0f}"


def _times(row: Row) -> str:
    epochs = list(dict.fromkeys(tuple(item.epoch for item in record.selections) for record in row.records))
    if len(epochs) != 1 or not epochs[0]:
        return "-"
    first, times = epochs[0][0], len(epochs[0])
    when = "before the first epoch" if first == 1 else f"after {count(first - 1, 'epoch')}"
    return when if times == 1 else f"{when}, {times} times in all"


def _seconds(row: Row) -> str:
    seconds = _mean([record for record in row.records if record.selections], _selecting)
    return "-" if seconds is None else f"{number(seconds)} s"


def _selecting(record: RunRecord) -> float:
    return sum(item.seconds for item in record.selections)


def _wrong(row: Row) -> tuple[float, float] | None:
    """Share of wrong labels in what was kept last and in all of the data."""
    last = [record.selections[-1] for record in row.records if record.selections]
    known = [(item, item.wrong, _whole(row)) for item in last if item.wrong is not None]
    if not known:
        return None
    whole = max(1, known[0][2])
    return fmean(wrong[0] / item.kept for item, wrong, _ in known), known[0][1][1] / whole


def _whole(row: Row) -> int:
    return next((record.samples[0] for record in row.records if record.samples is not None), 0)


def _wrong_words(row: Row) -> tuple[str, str]:
    found = _wrong(row)
    return ("-", "") if found is None else (f"{100 * found[0]:.1f} %", f"of all {100 * found[1]:.1f} %")


def _notes(row: Row) -> str:
    items: list[Selected] = [item for record in row.records for item in record.selections]
    return " ".join(dict.fromkeys(note for item in items for note in item.notes)) or "-"
