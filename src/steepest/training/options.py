"""Options of an optimizer, read from its constructor's own signature.

There is no second list of options: names, types and defaults come from `inspect.signature` and the
annotations. Values come from text (`--set sven.lr=0.5`) or from Python (a task's stored options).
"""

import ast
import dataclasses
import inspect
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from steepest.errors import InvalidOptionError
from steepest.training.convert import convert, dataclasses_of, describe
from steepest.training.errors import UnknownNameError, unknown

__all__ = ["OptionSpec", "check_options", "dataclass_specs", "option_specs", "parse_value"]

_WORDS: Mapping[str, object] = {"true": True, "false": False, "none": None}


@dataclass(frozen=True)
class OptionSpec:
    """Name, type and default of one option."""

    name: str
    annotation: Any
    default: object


def option_specs(constructor: Callable[..., object]) -> dict[str, OptionSpec]:
    """Read the options of a constructor.

    The first argument (the model or the parameters) and `params` are no options.

    Args:
        constructor: An optimizer class.

    Returns:
        Specification by name, in the constructor's order.
    """
    # object: one asks the class for its __init__ on purpose, whatever kind of callable it is.
    hints = typing.get_type_hints(getattr(constructor, "__init__", constructor))
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    specs = {
        parameter.name: OptionSpec(parameter.name, hints.get(parameter.name, Any), parameter.default)
        for parameter in parameters
        if parameter.name != "params" and parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    }
    passes_on = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if passes_on and isinstance(constructor, type) and constructor.__mro__[1] is not object:
        # `def __init__(self, model, *, metric=..., **options)`: the rest is the parent's.
        return option_specs(constructor.__mro__[1]) | specs
    return specs


def dataclass_specs(kind: Any) -> dict[str, OptionSpec]:
    """Read the options of a dataclass from its fields.

    Args:
        kind: The class.

    Returns:
        Specification by name, in the order of the fields.
    """
    hints = typing.get_type_hints(kind)
    return {
        item.name: OptionSpec(item.name, hints[item.name], _default(item))
        for item in dataclasses.fields(kind)
        if item.init
    }


def _default(item: "dataclasses.Field[Any]") -> object:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def check_options(owner: str, specs: Mapping[str, OptionSpec], options: Mapping[str, object]) -> dict[str, object]:
    """Check names and types of options.

    Args:
        owner: Name of the optimizer, for the messages.
        specs: What its constructor takes.
        options: Option values.

    Returns:
        The options with values of the right types.

    Raises:
        UnknownNameError: If the constructor has no such option.
        InvalidOptionError: If a value has the wrong type.
    """
    checked = {}
    for name, value in options.items():
        if name not in specs:
            raise UnknownNameError(unknown(f"option of {owner}", name, specs))
        annotation = specs[name].annotation
        if isinstance(value, Mapping) and "type" in value and dataclasses_of(annotation):
            value = _make_dataclass(str(value["type"]), {k: v for k, v in value.items() if k != "type"}, annotation)
        fits, checked[name] = convert(value, annotation)
        if not fits:
            wanted = describe(specs[name].annotation)
            raise InvalidOptionError(f"option {owner}.{name} got {value!r}: it takes {wanted}")
    return checked


def parse_value(text: str, annotation: Any) -> object:
    """Turn the text of an option into a Python value; `check_options` then checks its type.

    Args:
        text: Number, word, tuple, or `Name(key=value)` for an option that takes a dataclass.
        annotation: Type of the option, which names the dataclasses that it takes.

    Returns:
        The value; text that is none of these stays text.

    Raises:
        InvalidOptionError: If a dataclass is named that does not exist or does not take what is in its brackets.

    Example:
        >>> parse_value("(0.9, 0.99)", tuple[float, float])
        (0.9, 0.99)
        >>> parse_value("losses", str)
        'losses'
    """
    if text.strip().lower() in _WORDS:
        return _WORDS[text.strip().lower()]
    try:
        node = ast.parse(text.strip(), mode="eval").body
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and dataclasses_of(annotation):
            return _parse_dataclass(node, node.func.id, annotation)
        value: object = ast.literal_eval(node)
    except InvalidOptionError:
        raise
    except (SyntaxError, TypeError, ValueError, MemoryError, RecursionError):
        return text
    return value


def _parse_dataclass(node: ast.Call, name: str, annotation: Any) -> object:
    specs = _fields(name, annotation)
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise InvalidOptionError(f"{ast.unparse(node)}: write the values by name, as in {name}(key=value)")
    texts = {str(keyword.arg): ast.unparse(keyword.value) for keyword in node.keywords}
    values = {key: parse_value(text, specs[key].annotation if key in specs else Any) for key, text in texts.items()}
    return _make_dataclass(name, values, annotation)


def _fields(name: str, annotation: Any) -> dict[str, OptionSpec]:
    """What a dataclass takes, of those that an annotation allows."""
    known = dataclasses_of(annotation)
    if name not in known:
        raise UnknownNameError(unknown("value", name, known))
    return dataclass_specs(known[name])


def _make_dataclass(name: str, values: Mapping[str, object], annotation: Any) -> object:
    checked = check_options(name, _fields(name, annotation), values)
    try:
        return dataclasses_of(annotation)[name](**checked)
    except (TypeError, ValueError) as error:
        raise InvalidOptionError(f"{name}: {error}") from error
