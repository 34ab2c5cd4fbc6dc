"""The engine: one forward and one backward, captured layer by layer, feeds every method."""

from steepest.engine.batched import BatchedCapture
from steepest.engine.capture import Capture, Rows, named_trainable
from steepest.engine.jacobian import Jacobian
from steepest.engine.reference import ReferenceCapture
from steepest.engine.scope import last_layer

__all__ = ["BatchedCapture", "Capture", "Jacobian", "ReferenceCapture", "Rows", "last_layer", "named_trainable"]
