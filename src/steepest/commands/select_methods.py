"""Selection methods by the names of the command line, with options read from their own fields."""

import inspect
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from functools import reduce
from operator import or_
from typing import Any

from steepest.errors import InvalidOptionError
from steepest.selection import EL2N, SAGE, GradMatch, GraNd, Herding, KCenter, Random
from steepest.selection.method import Method
from steepest.selection.stored import plain
from steepest.training.convert import dataclasses_of
from steepest.training.errors import UnknownNameError, unknown
from steepest.training.options import OptionSpec, check_options, parse_value

__all__ = ["make_method", "method_options", "method_specs", "methods", "parse_method_options"]


def methods() -> dict[str, type[Method]]:
    """All methods by name.

    Returns:
        Classes.
    """
    return {kind.name: kind for kind in (SAGE, Random, EL2N, GraNd, Herding, KCenter, GradMatch)}


def method_specs(name: str) -> dict[str, OptionSpec]:
    """What a method takes.

    Args:
        name: Its name; hyphens and case do not matter.

    Returns:
        Specification by option.
    """
    return _specs(_class(name))


def parse_method_options(texts: Sequence[str], name: str) -> dict[str, object]:
    """Read `--set OPTION=VALUE`; the method's name may stand before the option.

    Args:
        texts: What was given.
        name: The method.

    Returns:
        Values by option; `make_method` checks them.

    Raises:
        InvalidOptionError: If one is not written like that or names another method.
    """
    kind, parsed = _class(name), {}
    specs = _specs(kind)
    for text in texts:
        target, equals, value = text.partition("=")
        owner, dot, option = target.strip().rpartition(".")
        if not (equals and option):
            raise InvalidOptionError(f"--set {text!r}: write OPTION=VALUE, as in sketch_size=32")
        if dot and _plain(owner) != _plain(kind.name):
            raise InvalidOptionError(f"--set {text!r}: the method of this selection is {kind.name}, not {owner}")
        parsed[option] = parse_value(value, specs[option].annotation if option in specs else Any)
    return parsed


def make_method(name: str, options: Mapping[str, object]) -> Method:
    """Make a method.

    Args:
        name: Its name.
        options: Values by option.

    Returns:
        The method.
    """
    kind = _class(name)
    specs = _specs(kind)
    named = {option: _by_name(value, specs.get(option)) for option, value in options.items()}
    return kind(**check_options(kind.name, specs, named))


def method_options(method: Method) -> dict[str, object]:
    """Options of a method as a stored selection has them.

    Args:
        method: The method.

    Returns:
        Plain values by option.
    """
    return {name: plain(getattr(method, name)) for name in _specs(type(method))}


def _class(name: str) -> type[Method]:
    found = {_plain(known): kind for known, kind in methods().items()}.get(_plain(name))
    if found is None:
        raise UnknownNameError(unknown("selection method", name, methods()))
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _specs(kind: type[Method]) -> dict[str, OptionSpec]:
    hints = typing.get_type_hints(kind)
    return {
        item.name: OptionSpec(item.name, _annotation(hints[item.name]), _default(item))
        for item in fields(kind)  # type: ignore[arg-type]
        if item.init
    }


def _default(item: Any) -> object:
    return item.default_factory() if item.default is MISSING and item.default_factory is not MISSING else item.default


def _annotation(hint: Any) -> Any:
    """What an option takes; an abstract class stands for the dataclasses that follow it."""
    if not inspect.isclass(hint) or not inspect.isabstract(hint):
        return hint
    return reduce(or_, [kind for kind in hint.__subclasses__() if is_dataclass(kind)])


def _by_name(value: object, spec: OptionSpec | None) -> object:
    """A rule by its bare name, as in rule=top, is that rule with its defaults."""
    if not isinstance(value, str) or spec is None:
        return value
    known: dict[str, Any] = {name.lower(): kind for name, kind in dataclasses_of(spec.annotation).items()}
    kind = known.get(value.lower())
    return value if kind is None else kind()
