"""steepest: geometry-aware training of neural networks in PyTorch."""

from steepest.engine import Capture, Jacobian, ReferenceCapture
from steepest.errors import (
    CaptureError,
    ClosureError,
    InvalidOptionError,
    NonFiniteError,
    SteepestError,
    UnsupportedModelError,
)

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "CaptureError",
    "ClosureError",
    "InvalidOptionError",
    "Jacobian",
    "NonFiniteError",
    "ReferenceCapture",
    "SteepestError",
    "UnsupportedModelError",
    "__version__",
]
