"""Colours and matplotlib settings of all plots."""

from typing import Any

from steepest.training.registry import optimizers

__all__ = ["colour_of", "style"]


def colour_of(optimizer: str) -> str:
    """Colour of an optimizer, the same in every plot whatever else is compared.

    The entries take theirs from Okabe and Ito's palette, which readers with any colour vision can tell apart.

    Args:
        optimizer: Registry name.

    Returns:
        A hexadecimal colour.
    """
    return optimizers()[optimizer].colour


def style() -> dict[Any, Any]:
    """Matplotlib settings for `rc_context`.

    Returns:
        Settings by name.
    """
    return {
        "font.family": "DejaVu Sans",
        "font.size": 10.5,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.edgecolor": "#888888",
        "axes.labelcolor": "#333333",
        "xtick.color": "#444444",
        "ytick.color": "#444444",
        "ytick.left": False,
        "ytick.minor.left": False,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.8,
        "svg.fonttype": "path",
        # With the date left out, the same records give the same file.
        "svg.hashsalt": "steepest",
        "figure.facecolor": "white",
    }
