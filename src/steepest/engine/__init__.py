"""The engine: one forward and one backward, captured layer by layer, feeds every method."""

from steepest.engine.capture import Capture, Rows, named_trainable
from steepest.engine.jacobian import Jacobian
from steepest.engine.reference import ReferenceCapture

__all__ = ["Capture", "Jacobian", "ReferenceCapture", "Rows", "named_trainable"]
