"""Selection methods by name, and their options from text or from a file of settings, for every command alike."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any, cast

from steepest.errors import InvalidOptionError, SteepestError
from steepest.training.convert import dataclasses_of
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.options import OptionSpec, check_options, dataclass_specs, parse_value
from steepest.training.selections import METHODS, SelectionEntry

__all__ = ["checked_options", "get_method", "parse_pairs"]


def get_method(name: str, *others: str) -> SelectionEntry:
    """Look a selection method up.

    Args:
        name: Its name; case, hyphens and underscores do not matter.
        *others: What else could have stood there, for the message.

    Returns:
        The registry's entry.

    Raises:
        UnknownNameError: If there is no such method.

    Example:
        >>> get_method("grad-match").name
        'gradmatch'
    """
    plain = name.strip().lower().replace("-", "").replace("_", "")
    if plain not in METHODS:
        raise UnknownNameError(unknown("selection method", name, [*others, *METHODS]))
    return METHODS[plain]


def parse_pairs(
    where: str, entry: SelectionEntry, specs: Mapping[str, OptionSpec], parts: Iterable[str]
) -> dict[str, object]:
    """Read `NAME=VALUE`, or `METHOD.NAME=VALUE`, once for each option.

    Args:
        where: What the texts stand in, for the messages.
        entry: The method.
        specs: What may be set.
        parts: The texts.

    Returns:
        Values by option, not checked yet.

    Raises:
        InvalidOptionError: If a text is not written like that, is of another method, or repeats an option.
    """
    pairs: dict[str, object] = {}
    for part in parts:
        target, equals, value = (piece.strip() for piece in part.partition("="))
        owner, dot, name = target.rpartition(".")
        if not (equals and name and value):
            raise InvalidOptionError(f"{where}: {part!r} is no option, write NAME=VALUE, as in seed=1")
        if dot and get_method(owner) is not entry:
            raise InvalidOptionError(f"{where}: the method of this selection is {entry.name}, not {owner}")
        if name in pairs:
            raise InvalidOptionError(f"{where}: {name} is given twice, give it once")
        pairs[name] = parse_value(value, specs[name].annotation if name in specs else Any)
    return pairs


def checked_options(
    entry: SelectionEntry, specs: Mapping[str, OptionSpec], given: Mapping[str, object]
) -> dict[str, object]:
    """Check options. Those of an option may stand beside it: `tail_cut` is `rule`'s.

    Args:
        entry: The method.
        specs: What may be set.
        given: Values by option.

    Returns:
        Those that differ from the defaults, in the order of the fields, with values of the right types.
    """
    own = {name: _by_name(value, specs[name].annotation) for name, value in given.items() if name in specs}
    checked = check_options(entry.name, specs, own)
    for name, value in given.items():
        if name in specs:
            continue
        outer = _owner(entry, specs, checked, name)
        holder = cast(Any, checked.get(outer, specs[outer].default))
        found = check_options(outer, dataclass_specs(type(holder)), {name: value})
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


def _by_name(value: object, annotation: Any) -> object:
    """A dataclass by the beginning of its name, as in top for Top; anything else stays what it is."""
    if not isinstance(value, str) or not value.isidentifier():
        return value
    word = value.lower()
    kinds = {name.lower(): kind for name, kind in dataclasses_of(annotation).items()}
    named = [kind for name, kind in kinds.items() if name.startswith(word)]
    found = kinds.get(word) or (named[0] if len(named) == 1 else None)
    return value if found is None else found()
