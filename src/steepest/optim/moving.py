"""How Sven moves parameters: along shares of a direction that is formed once."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.jacobian import SpreadJacobian
from steepest.optim._apply import check_magnitude, decay
from steepest.optim.gram import Solution
from steepest.optim.system import System, widened

__all__ = ["Mover"]


class Mover:
    """Moves parameters along solutions of one system.

    Args:
        system: The conditions.
        groups: The parameter groups that Sven trains.
        params: All parameters by name.
        momentum: Share of the direction before that belongs to every direction.

    Attributes:
        decay: Share by which the parameters shrink, before the learning rate and beside weight decay.
    """

    def __init__(
        self, system: System, groups: Sequence[Mapping[str, Any]], params: Mapping[str, Tensor], momentum: float
    ) -> None:
        names = {id(p): name for name, p in params.items()}
        self._system, self._momentum, self._params = system, momentum, params
        self.decay = system.decay
        self._groups = [(group, [names[id(p)] for p in group["params"]]) for group in groups]
        # Then d is J^T w in the parameters' own shapes, and can be added to them without a copy.
        self._straight = system.geometry is None and system.previous is None and not system.index
        self._straight = self._straight and not isinstance(system.jacobian, SpreadJacobian)
        self._known: object = None  # the solution, as far as it is known by what it holds
        self._direction: dict[str, Tensor] | None = None
        self._norm = self._reach = 0.0

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of every parameter that moves, by name."""
        return {name: float(group["lr"]) for group, trained in self._groups for name in trained}

    def norm(self, solution: Solution) -> float:
        """Euclidean norm of a solution, without momentum, in the parameters' own coordinates.

        Args:
            solution: The solution.

        Returns:
            It; where it is not finite that in the metric, and no move along it will be allowed.
        """
        if self._system.geometry is None:
            return solution.norm
        self.direction(solution)
        return self._norm if self._norm < torch.inf else solution.norm

    def direction(self, solution: Solution) -> dict[str, Tensor]:
        """The direction of a solution in the parameters' own coordinates, with momentum.

        Args:
            solution: The solution; several that share weights or an explicit direction are one.

        Returns:
            The direction by name, of those output rows that the step changes.
        """
        self._meet(solution)
        if self._direction is None:
            self._direction = self._formed(solution)
        return self._direction

    def __call__(self, solution: Solution, share: float, *, rated: bool = True, shrinks: bool = False) -> None:
        """Move the parameters.

        Args:
            solution: The direction.
            share: How far along it, before the learning rate.
            rated: With the learning rate.
            shrinks: With weight decay too.

        Raises:
            NonFiniteError: If the direction is beyond what the parameters can hold; they stay as they are.
        """
        # The first share goes straight into the parameters; whoever asks for another one wants the direction kept.
        if self._meet(solution) and self._straight and rated and solution.weights is not None:
            if shrinks:
                self.shrink()
            alphas = {name: -float(group["lr"]) * share for group, trained in self._groups for name in trained}
            solution.jacobian.add_vjp_(self._params, solution.weights, alphas)
            return
        direction = self.direction(solution)
        check_magnitude(self._reach, self._system.jacobian.dtype, "lower lr, or raise the metric's damping")
        if shrinks:
            self.shrink()
        for group, trained in self._groups:
            params, index = group["params"], self._system.index
            updates = [widened(direction[n], p, index.get(n)) for n, p in zip(trained, params, strict=True)]
            torch._foreach_add_(params, updates, alpha=-(float(group["lr"]) if rated else 1.0) * share)

    def shrink(self, before: Mapping[Tensor, Tensor] | None = None) -> None:
        """Weight decay, before a move or after it.

        Args:
            before: Where every parameter was before the move.
        """
        for group, _ in self._groups:
            params, share = group["params"], group["weight_decay"] + self.decay
            if before is None:
                decay(params, lr=group["lr"], weight_decay=share)
            elif share:
                torch._foreach_add_(params, [before[p] for p in params], alpha=-float(group["lr"]) * share)

    def _meet(self, solution: Solution) -> bool:
        """Forget the direction of another solution; returns whether this one is new."""
        known = solution.weights if solution.explicit is None else solution.explicit
        if known is self._known:
            return False
        self._known, self._direction, self._norm, self._reach = known, None, 0.0, 0.0
        return True

    def _formed(self, solution: Solution) -> dict[str, Tensor]:
        geometry, previous = self._system.geometry, self._system.previous
        direction = solution.direction() if geometry is None else geometry.direction(solution)
        if geometry is not None:
            self._norm = self._reach = _length(direction)
        if previous is not None:
            direction = {n: d.add(previous[n], alpha=self._momentum) for n, d in direction.items()}
            self._reach = _length(direction)
        return direction


def _length(direction: Mapping[str, Tensor]) -> float:
    norms = torch._foreach_norm(list(direction.values()))
    return float(torch.linalg.vector_norm(torch.stack(norms).double()))
