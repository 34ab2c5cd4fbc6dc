"""What a run is to select, in one line of text: `METHOD:FRACTION[:NAME=VALUE...]`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.convert import dataclasses_of
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.options import OptionSpec, check_options, dataclass_specs, parse_value
from steepest.training.selections import METHODS, TIMES, SelectionEntry, SelectionPlan

__all__ = ["parse_selection", "parse_selections", "selection_label"]


def parse_selection(text: str) -> SelectionPlan | None:
    """Read `METHOD:FRACTION[:NAME=VALUE...]`.

    Options of an option may stand beside it: `rule=strata:tail_cut=0.3` is `rule=Strata(tail_cut=0.3)`.

    Args:
        text: What the user wrote.

    Returns:
        The plan; None for `none`, which trains on everything.

    Raises:
        InvalidOptionError: If it is not written like that, or a value is impossible.
        UnknownNameError: If there is no such method or option.

    Example:
        >>> parse_selection("random:0.10:every=1:warmup=1").text
        'random:0.1:every=1'
    """
    name, *parts = (part.strip() for part in text.split(":"))
    if name == "none":
        if parts:
            raise InvalidOptionError(f"selection {text!r}: none trains on everything and takes nothing, write none")
        return None
    name = name.replace("-", "").lower()  # GradMatch, grad-match and gradmatch are one
    if name not in METHODS:
        raise UnknownNameError(unknown("selection method", name, ["none", *METHODS]))
    if not parts:
        raise InvalidOptionError(f"selection {text!r}: write METHOD:FRACTION, as in {name}:0.1, or none")
    entry = METHODS[name]
    options = _options(entry, _pairs(text, parts[1:]))
    times = {key: cast(int, options.pop(key, TIMES[key].default)) for key in TIMES}
    for key, value in times.items():
        if value < 0:
            raise InvalidOptionError(f"selection {text!r}: {key} is {value}, give a whole number of epochs from 0 on")
    plan = SelectionPlan(entry, _fraction(text, parts[0]), options, **times)
    try:
        run = plan.method().begin()
    except SteepestError as error:
        raise InvalidOptionError(f"selection {text!r}: {error}") from error
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"{name} does not take these options: {error}") from error
    if any(run.reads(number) == "reference" for number in range(run.passes)):
        raise InvalidOptionError(
            f"selection {text!r} compares with data of its own, and a run has none to give: use steepest."
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


def _pairs(text: str, parts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for part in parts:
        name, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and name and value):
            raise InvalidOptionError(f"selection {text!r}: {part!r} is no option, write NAME=VALUE, as in warmup=2")
        if name in pairs:
            raise InvalidOptionError(f"selection {text!r}: {name} is given twice, give it once")
        pairs[name] = value
    return pairs


def _options(entry: SelectionEntry, pairs: Mapping[str, str]) -> dict[str, object]:
    """Checked options that differ from the defaults, in the order of the fields."""
    specs = entry.specs()
    own = {name: _value(text, specs[name].annotation) for name, text in pairs.items() if name in specs}
    checked = check_options(entry.name, specs, own)
    inner = {name: text for name, text in pairs.items() if name not in specs}
    for name, text in inner.items():
        outer = _owner(entry, specs, checked, name)
        holder = cast(Any, checked.get(outer, specs[outer].default))
        kinds = dataclass_specs(type(holder))
        found = check_options(outer, kinds, {name: _value(text, kinds[name].annotation)})
        checked[outer] = _replaced(f"{entry.name}.{outer}", holder, found)
    return {name: checked[name] for name in specs if name in checked and checked[name] != specs[name].default}


def _owner(entry: SelectionEntry, specs: Mapping[str, OptionSpec], given: Mapping[str, object], name: str) -> str:
    """The option that holds a dataclass with a field of this name."""
    held = {outer: given.get(outer, spec.default) for outer, spec in specs.items()}
    fields = {
        item.name: outer
        for outer, value in held.items()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        for item in dataclasses.fields(value)
    }
    if name not in fields:
        raise UnknownNameError(unknown(f"option of {entry.name}", name, [*specs, *fields]))
    return fields[name]


def _replaced(owner: str, holder: Any, changes: Mapping[str, object]) -> object:
    try:
        return dataclasses.replace(holder, **changes)
    except (SteepestError, TypeError, ValueError) as error:
        raise InvalidOptionError(f"{owner}: {error}") from error


def _value(text: str, annotation: Any) -> object:
    """As `parse_value`, and a dataclass by the beginning of its name, as in top for Top."""
    word = text.strip().lower()
    kinds = {name.lower(): kind for name, kind in dataclasses_of(annotation).items()}
    named = [kind for name, kind in kinds.items() if name.startswith(word)] if word.isidentifier() else []
    found = kinds.get(word) or (named[0] if len(named) == 1 else None)
    return parse_value(text, annotation) if found is None else found()
