"""Numbers, options and counts as people read them."""

import re
from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "count",
    "flat_options",
    "listing",
    "memory",
    "number",
    "option_text",
    "options_text",
    "score",
    "short",
    "times",
]

# Between the last two a whole number says it better than an exponent; below the first nobody counts zeros.
_SMALL, _WHOLE, _LARGE = 1e-3, 1e3, 1e5
# Above it, four digits of an R2 say nothing.
_NEXT_TO_ONE = 0.9999
_ZEROS_OF_EXPONENT = re.compile(r"e([+-])0*(\d)")


def number(value: float | None, digits: int = 3) -> str:
    """A number with a fixed count of significant digits, so that columns can be compared.

    Args:
        value: The number; None is shown as a dash.
        digits: Significant digits.

    Returns:
        The text.

    Example:
        >>> [number(value) for value in (0.1, 12.345, 4321.0, 5.5064e-11, 0.0)]
        ['0.100', '12.3', '4321', '5.51e-11', '0']
    """
    if value is None:
        return "-"
    if value == 0:
        return "0"
    if _WHOLE <= abs(value) < _LARGE:
        text = f"{value:.0f}"
    elif abs(value) < _SMALL:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:#.{digits}g}"
    return _ZEROS_OF_EXPONENT.sub(lambda match: f"e{match[1].strip('+')}{match[2]}", text).rstrip(".")


def score(value: float, plain: Callable[[float], str] = number) -> str:
    """A metric whose best value may be 1; next to that its distance says more than its digits.

    Args:
        value: The number.
        plain: How it is shown elsewhere.

    Returns:
        The text.

    Example:
        >>> [score(value) for value in (0.85, 1 - 2.5e-8, 31.5)]
        ['0.850', '1 - 2.5e-8', '31.5']
    """
    return f"1 - {number(1 - value, 2)}" if _NEXT_TO_ONE < value < 1.0 else plain(value)


def times(value: float) -> str:
    """A ratio.

    Args:
        value: The ratio.

    Returns:
        The text.

    Example:
        >>> [times(value) for value in (0.104, 1.28, 24792.0)]
        ['0.10', '1.3', '25,000']
    """
    if value >= _LARGE * 10:
        return number(value, 2)
    return f"{float(f'{value:.2g}'):,.0f}" if value >= 10 else number(value, 2)


def short(value: float) -> str:
    """A number as short as it goes, for options and axes.

    Args:
        value: The number.

    Returns:
        The text.

    Example:
        >>> [short(value) for value in (0.1, 1e-06, 2.0)]
        ['0.1', '1e-6', '2']
    """
    return _ZEROS_OF_EXPONENT.sub(lambda match: f"e{match[1].strip('+')}{match[2]}", f"{value:.6g}")


def count(amount: int, noun: str) -> str:
    """An amount with its noun.

    Args:
        amount: How many.
        noun: Of what, in the singular.

    Returns:
        The words.

    Example:
        >>> count(1, "run"), count(3, "run")
        ('1 run', '3 runs')
    """
    return f"{amount:,} {noun}{'' if amount == 1 else 's'}"


def listing(parts: Sequence[str]) -> str:
    """Words in a row, with "and" before the last.

    Args:
        parts: The words.

    Returns:
        The text.

    Example:
        >>> listing(["a", "b", "c"])
        'a, b and c'
    """
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def memory(amount: float) -> str:
    """Bytes in the largest unit that fits.

    Args:
        amount: Bytes.

    Returns:
        The text.
    """
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if amount >= size:
            return f"{amount / size:.1f} {unit}"
    return f"{amount / 2**10:.0f} KiB"


def option_text(value: object) -> str:
    """Value of an option as one would write it on the command line.

    Args:
        value: The value, as JSON holds it.

    Returns:
        The text.

    Example:
        >>> option_text({"type": "Damped", "damping": 0.1})
        'Damped(damping=0.1)'
    """
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return short(value)
    if isinstance(value, Mapping):
        inside = ", ".join(f"{key}={option_text(part)}" for key, part in value.items() if key != "type")
        return f"{value.get('type', '')}({inside})"
    if isinstance(value, list | tuple):
        return f"({', '.join(option_text(part) for part in value)})"
    return str(value)


def options_text(options: Mapping[str, object]) -> str:
    """All options in one line.

    Args:
        options: Values by name.

    Returns:
        The text; says so where nothing was set.
    """
    return ", ".join(f"{name}={option_text(value)}" for name, value in options.items()) or "all defaults"


def flat_options(options: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Options with those inside of others by dotted names; what a dataclass is stands under its own name.

    Args:
        options: Values by name.
        prefix: Put before every name.

    Returns:
        Text by dotted name.

    Example:
        >>> flat_options({"lr": 1.0, "solver": {"type": "Damped", "damping": 0.1}})
        {'lr': '1', 'solver': 'Damped', 'solver.damping': '0.1'}
    """
    flat: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping):
            flat[prefix + name] = str(value.get("type", "set"))
            inner = {key: part for key, part in value.items() if key != "type"}
            flat |= flat_options(inner, f"{prefix}{name}.")
        else:
            flat[prefix + name] = option_text(value)
    return flat
