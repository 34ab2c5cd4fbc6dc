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
from steepest.optim import Damped, RandomizedSVD, Sven, TruncatedEigh, TruncatedSVD

__version__ = "0.1.0"

__all__ = [
    "Capture",
    "CaptureError",
    "ClosureError",
    "Damped",
    "InvalidOptionError",
    "Jacobian",
    "NonFiniteError",
    "RandomizedSVD",
    "ReferenceCapture",
    "SteepestError",
    "Sven",
    "TruncatedEigh",
    "TruncatedSVD",
    "UnsupportedModelError",
    "__version__",
]
