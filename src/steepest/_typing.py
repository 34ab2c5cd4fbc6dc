"""Types shared by several rooms."""

from typing import Literal

__all__ = ["Precision", "Sharing"]

Precision = Literal["float64", "float32"]
Sharing = Literal["expand", "reduce"]
