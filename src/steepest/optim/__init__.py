"""Optimizers: each a real torch.optim.Optimizer, fed by the engine."""

from steepest.optim.solvers import Damped, RandomizedSVD, Solution, Solver, TruncatedEigh, TruncatedSVD
from steepest.optim.sven import Sven, SvenDiagnostics

__all__ = [
    "Damped",
    "RandomizedSVD",
    "Solution",
    "Solver",
    "Sven",
    "SvenDiagnostics",
    "TruncatedEigh",
    "TruncatedSVD",
]
