"""steepest: geometry-aware training of neural networks in PyTorch.

Names are imported when they are first used, so that the command line starts without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steepest import nn as nn
    from steepest.engine import BatchedCapture, Capture, Jacobian, ReferenceCapture
    from steepest.errors import (
        CaptureError,
        ClosureError,
        InvalidOptionError,
        NonFiniteError,
        OutputError,
        SelectionError,
        SteepestError,
        UnsupportedModelError,
    )
    from steepest.linalg import FrequentDirections
    from steepest.optim import (
        FOP,
        KFAC,
        LPSGD,
        LPSGDM,
        BalancedMetric,
        Cholesky,
        ConstantP,
        CosineAnnealingP,
        Damped,
        Eigenbasis,
        EigenbasisCorrected,
        Empirical,
        Exact,
        KalmanFilter,
        KroneckerMetric,
        LeaveOneOut,
        LevenbergMarquardt,
        LinearAnnealingP,
        MonteCarlo,
        RandomizedSVD,
        Sven,
        TruncatedEigh,
        TruncatedSVD,
        ggn_rows,
    )
    from steepest.selection import (
        EL2N,
        SAGE,
        GradMatch,
        GraNd,
        Herding,
        KCenter,
        Random,
        RandomAboveCut,
        ReselectingSampler,
        Selection,
        Strata,
        Top,
        select_subset,
    )

__version__ = "0.1.0"

__all__ = [
    "EL2N",
    "FOP",
    "KFAC",
    "LPSGD",
    "LPSGDM",
    "SAGE",
    "BalancedMetric",
    "BatchedCapture",
    "Capture",
    "CaptureError",
    "Cholesky",
    "ClosureError",
    "ConstantP",
    "CosineAnnealingP",
    "Damped",
    "Eigenbasis",
    "EigenbasisCorrected",
    "Empirical",
    "Exact",
    "FrequentDirections",
    "GraNd",
    "GradMatch",
    "Herding",
    "InvalidOptionError",
    "Jacobian",
    "KCenter",
    "KalmanFilter",
    "KroneckerMetric",
    "LeaveOneOut",
    "LevenbergMarquardt",
    "LinearAnnealingP",
    "MonteCarlo",
    "NonFiniteError",
    "OutputError",
    "Random",
    "RandomAboveCut",
    "RandomizedSVD",
    "ReferenceCapture",
    "ReselectingSampler",
    "Selection",
    "SelectionError",
    "SteepestError",
    "Strata",
    "Sven",
    "Top",
    "TruncatedEigh",
    "TruncatedSVD",
    "UnsupportedModelError",
    "__version__",
    "ggn_rows",
    "select_subset",
]

_ROOMS: dict[str, tuple[str, ...]] = {
    "engine": ("BatchedCapture", "Capture", "Jacobian", "ReferenceCapture"),
    "errors": (
        "CaptureError",
        "ClosureError",
        "InvalidOptionError",
        "NonFiniteError",
        "OutputError",
        "SelectionError",
        "SteepestError",
        "UnsupportedModelError",
    ),
    "linalg": ("FrequentDirections",),
    "nn": (),  # steepest.nn.ResNet: as in torch, models are not at the top
    "optim": (
        "FOP",
        "KFAC",
        "LPSGD",
        "LPSGDM",
        "BalancedMetric",
        "Cholesky",
        "ConstantP",
        "CosineAnnealingP",
        "Damped",
        "Eigenbasis",
        "EigenbasisCorrected",
        "Empirical",
        "Exact",
        "KalmanFilter",
        "KroneckerMetric",
        "LeaveOneOut",
        "LevenbergMarquardt",
        "LinearAnnealingP",
        "MonteCarlo",
        "RandomizedSVD",
        "Sven",
        "TruncatedEigh",
        "TruncatedSVD",
        "ggn_rows",
    ),
    "selection": (
        "EL2N",
        "GradMatch",
        "GraNd",
        "Herding",
        "KCenter",
        "Random",
        "RandomAboveCut",
        "ReselectingSampler",
        "SAGE",
        "Selection",
        "Strata",
        "Top",
        "select_subset",
    ),
}
_HOMES = {name: f"steepest.{room}" for room, names in _ROOMS.items() for name in names}


def __getattr__(name: str) -> object:
    if name in _HOMES:
        value: object = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in _ROOMS:  # `steepest.optim` after `import steepest`
        return import_module(f"steepest.{name}")
    raise AttributeError(f"module 'steepest' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
