"""What one step of Sven works on and leaves behind: its conditions, its defaults, its diagnostics."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from steepest.engine import Jacobian, Rows
from steepest.errors import InvalidOptionError
from steepest.optim.metric import Geometry, KroneckerMetric
from steepest.optim.solvers import Solver

__all__ = ["SvenDiagnostics", "System", "chosen_metric", "default_kappa", "stacked", "widened"]


@dataclass(frozen=True, eq=False)
class SvenDiagnostics:
    """What the last step did.

    Args:
        rows: Number of conditions R, of all processes.
        rank: Singular directions used.
        spectrum: Singular values of J, largest first, float64; None where the solver needs none.
        noise_floor: Relative size below which singular values are rounding.
        update_norm: Norm of the direction d before lr, after clipping: Euclidean, or that of the metric.
        clipped: Whether the norm guard shortened it.
        num_clipped: How many steps it has shortened so far.
        num_skipped: How many non-finite steps were skipped so far.
        damping: Absolute damping that the solver chose, in squared singular values; None where it chooses none.
        length: Share of d that was taken before lr: the solver's advice.
        accepted: Whether the parameters moved; `LevenbergMarquardt` takes back what does not help.
    """

    rows: int
    rank: int
    spectrum: Tensor | None
    noise_floor: float
    update_norm: float
    clipped: bool
    num_clipped: int
    num_skipped: int
    damping: float | None = None
    length: float = 1.0
    accepted: bool = True


@dataclass(frozen=True, eq=False)
class System:
    """The conditions that one step solves.

    Args:
        whole: Their Jacobian in all parameters.
        jacobian: In those that Sven trains and this step changes.
        geometry: The same in the coordinates of the metric, if there is one.
        rhs: ``[R]``, what is left of the rows by the momentum.
        slopes: ``[R]``, derivatives of the mean loss in the rows.
        samples: Number of samples and rows of each, block by block.
        index: Output rows that this step changes, where it does not change all.
        previous: The direction of the step before, where there is momentum.
        loss: Mean loss.
        given: The rows, ``[R]``.
    """

    whole: Jacobian
    jacobian: Jacobian
    geometry: Geometry | None
    rhs: Tensor
    slopes: Tensor
    samples: list[tuple[int, int]]
    index: dict[str, Tensor]
    previous: dict[str, Tensor] | None
    loss: Tensor
    given: Tensor

    @property
    def used(self) -> Jacobian:
        """The Jacobian that is solved with."""
        return self.jacobian if self.geometry is None else self.geometry.jacobian


def default_kappa(kappa: float | None, solver: Solver | None) -> float:
    """The root of a loss is the residual behind it; the paper's solvers take the losses themselves."""
    return kappa if kappa is not None else (1.0 if solver is None else 2.0)


def chosen_metric(
    metric: KroneckerMetric | Literal["auto"] | None, solver: Solver | None, fraction: float
) -> KroneckerMetric | None:
    """Check the option and say what "auto" means.

    Args:
        metric: The option.
        solver: The user's solver.
        fraction: Random fraction of the output rows that a step changes.

    Returns:
        The metric, or None for the Euclidean norm.

    Raises:
        InvalidOptionError: If it is none, or does not go with ``fraction``.
    """
    if metric == "auto":
        return KroneckerMetric() if solver is None and fraction == 1 else None
    if metric is not None and not isinstance(metric, KroneckerMetric):
        raise InvalidOptionError(f"metric={metric!r}: give steepest.KroneckerMetric(...), None for none, or 'auto'.")
    if metric is not None and fraction < 1:
        raise InvalidOptionError(
            f"metric={metric!r} with fraction={fraction:g}: a metric is that of whole layers; drop one of the two."
        )
    return metric


def widened(update: Tensor, param: Tensor, index: Tensor | None) -> Tensor:
    """Put the update of some output rows into zeros of the parameter's shape."""
    if index is None or param.ndim == 0:
        return update
    return torch.zeros_like(param).index_copy_(0, index, update)


def stacked(rows: Rows) -> Tensor:
    """All blocks as one vector ``[R]``, without a graph."""
    blocks = rows.values() if isinstance(rows, Mapping) else [rows]
    return torch.cat([block.detach().flatten() for block in blocks])
