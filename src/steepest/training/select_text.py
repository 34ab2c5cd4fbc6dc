"""What a run is to select, in one line of text: `METHOD:FRACTION[:NAME=VALUE...]`."""

from collections.abc import Sequence
from typing import cast

from steepest.errors import InvalidOptionError
from steepest.training.select_options import checked_options, get_method, parse_pairs
from steepest.training.selecting import reads_reference
from steepest.training.selections import TIMES, SelectionPlan

__all__ = ["parse_selection", "parse_selections", "selection_label"]


def parse_selection(text: str) -> SelectionPlan | None:
    """Read `METHOD:FRACTION[:NAME=VALUE...]`.

    Options of an option may stand beside it: `rule=strata:tail_cut=0.3` is `rule=Strata(tail_cut=0.3)`.

    Args:
        text: What the user wrote.

    Returns:
        The plan; None for `none`, which trains on everything.

    Raises:
        InvalidOptionError: If it is not written like that, a name does not exist, or a value is impossible.

    Example:
        >>> parse_selection("random:0.10:every=1:warmup=1").text
        'random:0.1:every=1'
    """
    name, *parts = (part.strip() for part in text.split(":"))
    if name == "none":
        if parts:
            raise InvalidOptionError(f"selection {text!r}: none trains on everything and takes nothing, write none")
        return None
    entry, where = get_method(name, "none"), f"selection {text!r}"
    if not parts:
        raise InvalidOptionError(f"{where}: write METHOD:FRACTION, as in {entry.name}:0.1, or none")
    specs = {**entry.specs(), **TIMES}
    options = checked_options(entry, specs, parse_pairs(where, entry, specs, parts[1:]))
    times = {key: cast(int, options.pop(key, TIMES[key].default)) for key in TIMES}
    for key, value in times.items():
        if value < 0:
            raise InvalidOptionError(f"{where}: {key} is {value}, give a whole number of epochs from 0 on")
    plan = SelectionPlan(entry, _fraction(text, parts[0]), options, **times)
    if reads_reference(entry.make(options, where)):
        raise InvalidOptionError(
            f"{where} compares with data of its own, and a run has none to give: use steepest."
            "select_subset, which takes reference="
        )
    return plan


def parse_selections(texts: Sequence[str | None]) -> list[SelectionPlan | None]:
    """Read what several runs select.

    Args:
        texts: What the user wrote; None as `none`.

    Returns:
        One plan for each, None where all of the data are trained on.

    Raises:
        InvalidOptionError: If one is wrong, or two are the same.
    """
    plans = [parse_selection("none" if text is None else text) for text in texts]
    names = ["none" if plan is None else plan.text for plan in plans]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidOptionError(f"the selection {twice} is named twice: name each once")
    return plans


def selection_label(text: str) -> str:
    """Name of a selection for tables.

    Args:
        text: What `SelectionPlan.text` gave; what this version cannot read stands for itself.

    Returns:
        The label.

    Example:
        >>> selection_label("random:0.1:every=1")
        'random 0.1 (every=1)'
    """
    name, fraction, *options = [*text.split(":"), ""]
    given = ", ".join(filter(None, options))
    return f"{name} {fraction}{f' ({given})' if given else ''}".strip()


def _fraction(text: str, part: str) -> float:
    try:
        fraction = float(part)
    except ValueError:
        fraction = -1.0
    if not 0 < fraction <= 1:
        raise InvalidOptionError(
            f"selection {text!r}: the fraction is {part!r}, give a number above 0 and at most 1, as in 0.1"
        )
    return fraction
