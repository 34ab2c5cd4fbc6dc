"""Types shared by several rooms."""

from typing import Literal

__all__ = ["Precision"]

Precision = Literal["float64", "float32"]
