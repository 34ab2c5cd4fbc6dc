"""What one step of Sven works on and leaves behind: its conditions, its outcome, its diagnostics."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.engine import Jacobian, Rows
from steepest.optim.balance import BalancedGeometry
from steepest.optim.gram import Solution
from steepest.optim.metric import Geometry

__all__ = ["Outcome", "SvenDiagnostics", "System", "stacked", "widened"]


@dataclass(frozen=True, eq=False)
class SvenDiagnostics:
    """What the last step did.

    Args:
        rows: Number of conditions R, of all processes.
        rank: Singular directions used.
        spectrum: Singular values of J, largest first, float64; None where the solver needs none.
        noise_floor: Relative size below which singular values are rounding.
        update_norm: Norm of the direction d before lr, after clipping, without momentum's share: Euclidean, or that of
            the metric.
        clipped: Whether the norm guard shortened it.
        num_clipped: How many steps it has shortened so far.
        num_skipped: How many non-finite steps were skipped so far.
        damping: Absolute damping that the solver chose, in squared singular values, or noise in squared rows; None
            where it chooses none.
        length: Share of d that was taken before lr: the solver's advice.
        accepted: Whether the parameters moved; solvers that try their steps take back what does not help.
        decay: Share of the parameters that ``relative_decay`` took away before lr.
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
    decay: float = 0.0


@dataclass(frozen=True, eq=False)
class System:
    """The conditions that one step solves.

    Args:
        whole: Their Jacobian in all parameters.
        jacobian: In those that Sven trains and this step changes.
        geometry: The same in the coordinates of the metric, if there is one.
        rhs: ``[R]``, what is left of the rows by the momentum.
        samples: Number of samples and rows of each, block by block.
        totals: Number of samples of the whole batch in each of these blocks, which several processes may share.
        index: Output rows that this step changes, where it does not change all.
        previous: The direction of the step before, where there is momentum.
        loss: Mean loss.
        given: The rows, ``[R]``.
        decay: Share by which the parameters shrink, before the learning rate.
    """

    whole: Jacobian
    jacobian: Jacobian
    geometry: Geometry | BalancedGeometry | None
    rhs: Tensor
    samples: list[tuple[int, int]]
    totals: list[int]
    index: dict[str, Tensor]
    previous: dict[str, Tensor] | None
    loss: Tensor
    given: Tensor
    decay: float = 0.0

    @property
    def used(self) -> Jacobian:
        """The Jacobian that is solved with."""
        return self.jacobian if self.geometry is None else self.geometry.jacobian


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a step came to.

    Args:
        solution: The direction, with its length and the solver's memory.
        scale: Factor of the norm guard.
        accepted: Whether the parameters moved.
        direction: The direction in the parameters, where it is to be remembered for momentum.
    """

    solution: Solution
    scale: float
    accepted: bool
    direction: dict[str, Tensor] | None


def widened(update: Tensor, param: Tensor, index: Tensor | None) -> Tensor:
    """Put the update of some output rows into zeros of the parameter's shape."""
    if index is None or param.ndim == 0:
        return update
    return torch.zeros_like(param).index_copy_(0, index, update)


def stacked(rows: Rows) -> Tensor:
    """All blocks as one vector ``[R]``, without a graph."""
    blocks = rows.values() if isinstance(rows, Mapping) else [rows]
    return torch.cat([block.detach().flatten() for block in blocks])
