"""Checks of option values, each with one clear message."""

import math
from typing import Any

from steepest.errors import InvalidOptionError

__all__ = ["check_choice", "check_integer", "check_real"]


def check_real(
    name: str,
    value: Any,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return ``value`` as a float, or say what is wrong with it.

    Args:
        name: The option's name, as the user wrote it.
        value: What the user gave.
        low: Smallest value allowed.
        high: Largest value allowed.
        open_low: Whether ``low`` itself is excluded.
        open_high: Whether ``high`` itself is excluded.

    Returns:
        The value as a Python float.

    Raises:
        InvalidOptionError: If it is no finite number or lies outside the interval.
    """
    left, right = "(" if open_low else "[", ")" if open_high else "]"
    interval = f"{left}{low:g}, {high:g}{right}"
    number = math.nan
    if not isinstance(value, (bool, str)):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
    inside = (low < number if open_low else low <= number) and (number < high if open_high else number <= high)
    if not (math.isfinite(number) and inside):
        raise InvalidOptionError(f"{name}={value!r}: give a finite number in {interval}.")
    return number


def check_integer(name: str, value: Any, *, low: int) -> int:
    """Return ``value`` as an int of at least ``low``, or say what is wrong with it.

    Args:
        name: The option's name, as the user wrote it.
        value: What the user gave.
        low: Smallest value allowed.

    Returns:
        The value.

    Raises:
        InvalidOptionError: If it is no integer or below ``low``.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InvalidOptionError(f"{name}={value!r}: give an integer of at least {low}.")
    return value


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuse a value that is not among the choices.

    Args:
        name: The option's name, as the user wrote it.
        value: What the user gave.
        choices: The allowed values.

    Raises:
        InvalidOptionError: If ``value`` is none of them.
    """
    if value not in choices:
        raise InvalidOptionError(f"{name}={value!r}: choose one of {', '.join(map(repr, choices))}.")
