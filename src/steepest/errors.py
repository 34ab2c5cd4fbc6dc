"""Every error that steepest raises on purpose.

A message says what was found (qualified name, shape, value), why it cannot work, and what to do.
"""

__all__ = [
    "CaptureError",
    "CheckpointError",
    "ClosureError",
    "DamagedCheckpointError",
    "InvalidOptionError",
    "NonFiniteError",
    "OutputError",
    "SelectionError",
    "SteepestError",
    "UnsupportedModelError",
]


class SteepestError(Exception):
    """Base class of all errors raised by steepest."""


class UnsupportedModelError(SteepestError, RuntimeError):  # no TypeError: operators would swallow it
    """A layer or a use of a parameter for which no exact per-sample rule exists."""


class CaptureError(SteepestError, RuntimeError):
    """A capture was used in a way that cannot give a right Jacobian."""


class ClosureError(SteepestError, RuntimeError):
    """The closure passed to an optimizer's step returned something that it cannot use."""


class NonFiniteError(SteepestError, ArithmeticError):
    """A loss, gradient or update holds NaN or infinity; nothing was changed."""


class InvalidOptionError(SteepestError, ValueError):
    """An option has an impossible value."""


class OutputError(SteepestError):
    """A file or folder that cannot be written to."""


class SelectionError(SteepestError):
    """A selection of data that cannot be made, read, continued or applied to this data."""


class CheckpointError(SteepestError):
    """A checkpoint that cannot be read or belongs to something else."""


class DamagedCheckpointError(CheckpointError):
    """A folder or a file that is no readable checkpoint of any version."""
