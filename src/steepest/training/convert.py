"""Values from text, TOML and JSON, checked against type annotations.

Optimizer options and run records are both declared once, by annotations; this module holds the one check
that serves both.
"""

import dataclasses
import inspect
import sys
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["alternatives", "convert", "dataclasses_of", "describe", "plain"]


def alternatives(annotation: Any) -> tuple[Any, ...]:
    """Take a union apart.

    Args:
        annotation: Any annotation.

    Returns:
        The members of the union, or the annotation alone.

    Example:
        >>> alternatives(int | None)
        (<class 'int'>, <class 'NoneType'>)
    """
    if get_origin(annotation) in {Union, types.UnionType}:
        return tuple(kind for item in get_args(annotation) for kind in alternatives(item))
    return (annotation,)


def dataclasses_of(annotation: Any) -> dict[str, Any]:
    """Dataclasses that an annotation allows, by name.

    For a runtime-checkable protocol or an abstract class these are the dataclasses that follow it, in its own module
    and in the package around that, so that a new solver beside the others can be named at once.

    Args:
        annotation: Any annotation.

    Returns:
        Classes by name.
    """
    found: dict[str, Any] = {}
    for kind in alternatives(annotation):
        if dataclasses.is_dataclass(kind):
            found[getattr(kind, "__name__", str(kind))] = kind
        elif getattr(kind, "_is_runtime_protocol", False) or inspect.isabstract(kind):
            package = sys.modules.get(kind.__module__.rpartition(".")[0])
            members = vars(sys.modules[kind.__module__]) | ({} if package is None else vars(package))
            found |= {
                name: member
                for name, member in members.items()
                if isinstance(member, type) and dataclasses.is_dataclass(member) and issubclass(member, kind)
            }
    return found


def convert(value: object, annotation: Any) -> tuple[bool, Any]:
    """Check a value against an annotation.

    Integers become floats where only a float is allowed, lists become tuples where a tuple is wanted, and
    mappings become dataclasses (with the class name under `type` where there is a choice). Nothing else is
    converted: a bool is no number and a number is no text.

    Args:
        value: What the user or a file gave.
        annotation: What is wanted.

    Returns:
        Whether it fits, and the value in the wanted type.

    Example:
        >>> convert(1, float | None)
        (True, 1.0)
        >>> convert(True, int)
        (False, True)
    """
    for kind in alternatives(annotation):
        fits, converted = _convert_one(value, kind)
        if fits:
            return True, converted
    return False, value


def _convert_one(value: object, kind: Any) -> tuple[bool, Any]:
    if kind in {Any, object}:
        return True, value
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind), value
    if origin is tuple:
        return _convert_tuple(value, get_args(kind))
    if origin is list:
        fits, items = _convert_tuple(value, (*get_args(kind), Ellipsis))
        return fits, list(items) if fits else value
    if origin in {dict, Mapping}:
        return _convert_mapping(value, *get_args(kind))
    if kind is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        return fits, float(value) if fits else value  # type: ignore[arg-type]
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool), value
    if isinstance(value, Mapping):
        attempts = [_convert_dataclass(value, member) for member in dataclasses_of(kind).values()]
        return next((attempt for attempt in attempts if attempt[0]), (False, value))
    return isinstance(kind, type) and isinstance(value, kind), value


def _convert_tuple(value: object, kinds: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, (tuple, list)):
        return False, value
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(value)
    if len(value) != len(kinds):
        return False, value
    pairs = [convert(item, kind) for item, kind in zip(value, kinds, strict=True)]
    return all(fits for fits, _ in pairs), tuple(item for _, item in pairs)


def _convert_mapping(value: object, key_kind: Any, value_kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, Mapping):
        return False, value
    pairs = {key: convert(item, value_kind) for key, item in value.items()}
    fits = all(convert(key, key_kind)[0] for key in pairs) and all(fits for fits, _ in pairs.values())
    return fits, {key: item for key, (_, item) in pairs.items()}


def _convert_dataclass(value: Mapping[str, object], kind: Any) -> tuple[bool, Any]:
    hints = typing.get_type_hints(kind)
    fields = {item.name: hints[item.name] for item in dataclasses.fields(kind) if item.init}
    given = dict(value)
    if "type" not in fields and given.pop("type", kind.__name__) != kind.__name__:
        return False, value
    if not given.keys() <= fields.keys():
        return False, value
    pairs = {name: convert(item, fields[name]) for name, item in given.items()}
    if not all(fits for fits, _ in pairs.values()):
        return False, value
    try:
        return True, kind(**{name: item for name, (_, item) in pairs.items()})
    except (TypeError, ValueError):
        return False, value


def describe(annotation: Any) -> str:
    """Name what an annotation allows, for messages.

    Args:
        annotation: Any annotation.

    Returns:
        Words.

    Example:
        >>> describe(float | None)
        'float or none'
    """
    names = []
    for kind in alternatives(annotation):
        if get_origin(kind) is Literal:
            names += [repr(choice) for choice in get_args(kind)]
        elif get_origin(kind) is tuple:
            names.append(f"({', '.join('...' if item is ... else describe(item) for item in get_args(kind))})")
        elif known := dataclasses_of(kind):
            names += [f"{name}(...)" for name in known]
        elif getattr(kind, "__module__", "").split(".")[0] != "torch":
            # Tensor-valued options (a tensor lr) are for code, not for command lines and files.
            names.append({type(None): "none", str: "text"}.get(kind, getattr(kind, "__name__", str(kind))))
    return " or ".join(names)


def plain(value: object) -> object:
    """Turn a value into what JSON can hold; `convert` turns it back.

    Args:
        value: A checked value.

    Returns:
        The value itself, a list, or a mapping with the class name under `type`.

    Example:
        >>> plain((0.9, 0.999))
        [0.9, 0.999]
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [item.name for item in dataclasses.fields(value)]
        return {"type": type(value).__name__} | {name: plain(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(item) for item in value]
    return value
