"""What the optimizers say about their own steps: sentences and figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from steepest.report.charts import Charts, Figure
from steepest.report.groups import Cell, Row
from steepest.report.palette import looks
from steepest.report.plot import MOST_COLOURED
from steepest.report.spectra import rank_figure, spectra_of, spectrum_figure
from steepest.report.words import listing, number
from steepest.training.records import EpochPoint

__all__ = ["PROJECTION", "Inside", "inside"]

# Spectra are drawn one by one: of a grid of twenty learning rates a few are enough.
_MOST_SPECTRA = 4
_RANK = (
    "The kept rank says how many independent directions of a batch a step uses; each row of a batch is one condition "
    "that the step tries to meet."
)
_SPECTRUM = (
    "A spectrum that falls over many decades means that the conditions of a batch nearly depend on each other: few "
    "directions then carry most of what the batch has to say."
)

PROJECTION = (
    "r is the squared cosine of a batch's mean gradient and what its halves disagree about, in the inverse metric and "
    "averaged over the layers: the corrected gradient is sqrt(1 + 3 r) times as long as the mean's."
)


@dataclass(frozen=True)
class Inside:
    """What is known about the steps of the optimizers that tell of them."""

    sentences: tuple[str, ...]
    figures: tuple[Figure, ...]


def inside(cell: Cell, charts: Charts) -> Inside | None:
    """Say what the optimizers of a cell tell about their steps.

    Any optimizer counts that reports `rank`, `spectrum` or `r`, whatever its name.

    Args:
        cell: Runs that may be compared.
        charts: Draws the figures.

    Returns:
        Sentences and figures, or None if no optimizer tells anything.
    """
    dressed = list(zip(cell.rows, looks(cell.rows), strict=True))
    ranked = [(row, look) for row, look in dressed if _numbers(row, "rank")]
    spectral = [(row, look) for row, look in dressed if spectra_of(row)]
    projected = [row for row, _ in dressed if _numbers(row, "r")]
    if not ranked and not spectral and not projected:
        return None
    cut = [(row, look) for row, look in ranked if not _uses_all(row)]
    figures = [rank_figure(charts, cut[:MOST_COLOURED])] if cut else []
    figures += [spectrum_figure(charts, row, look) for row, look in spectral[:_MOST_SPECTRA]]
    sentences = [
        *_about_ranks([row for row, _ in cut]),
        *(_about_damping(row) for row, _ in ranked if _uses_all(row)),
        *_about_spectra([row for row, _ in spectral]),
        *_about_projections(projected),
    ]
    return Inside(tuple(sentences), tuple(figures))


def _about_ranks(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    ends = [f"{row.label} {_last(row, 'rank')}{_of_rows(row)}" for row in rows]
    return [_RANK, f"Used at the end: {listing(ends)}."]


def _of_rows(row: Row) -> str:
    return f" of {_last(row, 'rows')}" if _numbers(row, "rows") else ""


def _about_damping(row: Row) -> str:
    absent = "" if spectra_of(row) else "; it needs no spectrum for that, so none was recorded"
    return (
        f"{row.label} uses all {_last(row, 'rank')} directions of a batch in every step: its solver damps the small "
        f"ones and leaves none out{absent}."
    )


def _about_spectra(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    sentences = [_SPECTRUM]
    for row in rows[:_MOST_SPECTRA]:
        point = spectra_of(row)[-1]
        spectrum = point.series["spectrum"]
        ratio = number(spectrum[-1] / spectrum[0])
        sentences.append(f"At epoch {point.epoch} {row.label}'s smallest singular value is {ratio} of the largest.")
    if len(rows) > _MOST_SPECTRA:
        sentences.append(f"The spectra of {_MOST_SPECTRA} rows of {len(rows)} are shown.")
    return sentences


def _about_projections(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    found = [(row.label, median(_numbers(row, "r"))) for row in rows]
    ends = [f"{label} {r:.2g}, {(1 + 3 * r) ** 0.5:.2f} times as long" for label, r in found]
    return [f"{PROJECTION} Median over the epochs: {listing(ends)}."]


def _numbers(row: Row, name: str) -> list[float]:
    return [value for record in row.records for value in _of_run(record.history, name)]


def _last(row: Row, name: str) -> str:
    """Median of the last value of every run."""
    found = [_of_run(record.history, name) for record in row.finished or row.records]
    present = [values[-1] for values in found if values]
    return f"{median(present):g}" if present else "an unknown number"


def _of_run(history: Sequence[EpochPoint], name: str) -> list[float]:
    return [value for point in history if (value := point.diagnostics.get(name)) is not None]


def _uses_all(row: Row) -> bool:
    return _numbers(row, "rank") == _numbers(row, "rows")
