"""The axis of a loss or a metric: logarithmic where that makes sense, with labels that people can read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from steepest.report.words import short

__all__ = ["Scale", "count_epochs", "fit_axis", "power_of_ten", "scale_of"]

_LOG_RATIO, _TWO_DECADES, _HALF_DECADE = 3.0, 100.0, 5.0
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@dataclass(frozen=True)
class Scale:
    """What an axis shows: its ends, and whether it is logarithmic."""

    low: float
    top: float
    log: bool


def scale_of(values: Sequence[float], *, may_log: bool = True) -> Scale:
    """Choose an axis.

    Args:
        values: Everything that must be on it; what is not finite does not count.
        may_log: Whether it may be logarithmic.

    Returns:
        A logarithmic axis if all values are positive and the largest is above three times the smallest.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return Scale(0.0, 1.0, log=False)
    low, high = min(finite), max(finite)
    if may_log and low > 0 and high / low > _LOG_RATIO:
        room = (high / low) ** 0.05
        return Scale(max(low / room, 1e-300), min(high * room, 1e300), log=True)
    room = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
    return Scale(low - room, high + room, log=False)


def fit_axis(axes: Any, scale: Scale) -> None:
    """Give the vertical axis its scale, its grid and its labels.

    Args:
        axes: Matplotlib axes.
        scale: What to show.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.grid(visible=True, axis="y", which="major")
    axes.set_axisbelow(True)
    if not scale.log:
        axes.set_ylim(scale.low, scale.top)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: short(value)))
        return
    axes.set_yscale("log")
    axes.set_ylim(scale.low, scale.top)
    axes.yaxis.set_minor_locator(NullLocator())
    ratio = scale.top / scale.low
    if ratio >= _TWO_DECADES:
        axes.yaxis.set_major_locator(LogLocator(numticks=7))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: power_of_ten(value)))
        return
    # Powers of ten alone would leave an axis of less than two decades without labels.
    digits = (1.0, 2.0, 5.0) if ratio >= _HALF_DECADE else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=digits, numticks=12))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _position: short(value)))


def count_epochs(axes: Any) -> None:
    """Give the horizontal axis whole epochs.

    Args:
        axes: Matplotlib axes with their final limits.
    """
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))


def power_of_ten(value: float) -> str:
    """A power of ten as it is printed.

    Args:
        value: The number.

    Returns:
        The text.

    Example:
        >>> power_of_ten(1e-3), power_of_ten(1.0)
        ('10⁻³', '1')
    """
    exponent = round(math.log10(value))
    return {0: "1", 1: "10"}.get(exponent, "10" + str(exponent).translate(_SUPERSCRIPTS))
