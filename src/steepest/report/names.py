"""Names of rows for places with little room: short ones, and never two that look alike."""

import re
from collections.abc import Sequence

from steepest.report.groups import Row, label_of
from steepest.report.labels import fitting
from steepest.training.select_text import selection_label

__all__ = ["short_names"]

# An option that is itself an object with options, such as rule=Strata(tail_cut=0.3).
_OBJECT = re.compile(r"^\w+=([A-Z]\w*)(?:\((.*)\))?$")


def short_names(rows: Sequence[Row], length: int | None = None, *, shared: bool = False) -> list[str]:
    """Names of rows: what all selections share is left out, and what is too long is said in fewer words.

    Args:
        rows: Rows of one cell.
        length: Most characters of a name; None for any number.
        shared: Whether to keep what all selections share, where nothing else on the page says it.

    Returns:
        A name for each; their labels, where shorter ones would not tell the rows apart.
    """
    labels = [row.label for row in rows]
    names = labels if shared else _different([_without_shared(row, rows) for row in rows], labels)
    if length is None or max(map(len, names), default=0) <= length:
        return names
    terse = [_terse(row, name) for row, name in zip(rows, names, strict=True)]
    return fitting(_different(terse, names), length)


def _different(names: list[str], otherwise: list[str]) -> list[str]:
    return names if len(set(names)) == len(names) else otherwise


def _without_shared(row: Row, rows: Sequence[Row]) -> str:
    selects = [other.select for other in rows if other.select is not None]
    if row.select is None or len(selects) < 2:
        return row.label
    name = row.label
    if len({other.optimizer for other in rows}) == 1:
        name = name.removeprefix(f"{label_of(row.optimizer)}, ")
    fractions = {select.split(":")[1] for select in selects if ":" in select}
    return name.replace(f" {next(iter(fractions))}", "", 1) if len(fractions) == 1 else name


def _terse(row: Row, name: str) -> str:
    """Without brackets, and without names that their values imply."""
    if row.select is None:
        return name
    brackets = re.search(r" \((.*)\)$", selection_label(row.select))
    if brackets is None:
        return name
    options = [_value(option) for option in row.select.split(":")[2:]]
    return name.replace(brackets.group(0), f" {' '.join(options)}", 1)


def _value(option: str) -> str:
    found = _OBJECT.match(option)
    if found is None:
        return option
    return (found.group(2) or found.group(1)).replace(", ", " ")
