"""``J^T J + lambda D`` of the rows of one process or of several: formed once, factorised for every damping."""

import torch
from torch import Tensor

from steepest.distributed.agreement import attempt_together
from steepest.distributed.jacobian import SpreadJacobian
from steepest.engine import Jacobian
from steepest.linalg.outer import outer
from steepest.optim.gram import Solution, check_products, flatten, unflatten

__all__ = ["DampedSystem"]


class DampedSystem:
    """``J^T J + lambda D``, or the same in dual form with D a multiple of the identity.

    Several processes form it together, factorise it each for itself, and use what rank 0 found.

    Args:
        jacobian: J, of all processes.
        max_primal: Largest number of parameters for the primal form, where it is not larger than R anyway.
        scale: D of the step before; None at first.

    Attributes:
        scale: D: in primal form the running maximum of the diagonal, in dual form one number.
    """

    def __init__(self, jacobian: Jacobian, max_primal: int, scale: Tensor | None) -> None:
        self._jacobian = jacobian
        spread = jacobian if isinstance(jacobian, SpreadJacobian) else None
        self._local = jacobian if spread is None else spread.local
        self._ranks = None if spread is None else spread.ranks
        count = jacobian.num_parameters
        self._primal = count <= jacobian.num_rows or count <= max_primal
        if self._primal:
            self._dense = self._together()
            self._matrix = outer(self._dense.T)
            if self._ranks is not None:
                self._ranks.sum_([self._matrix])
            diagonal = self._matrix.diagonal().clone()
            self.scale = diagonal if scale is None else torch.maximum(scale.to(diagonal), diagonal)
        else:
            self._matrix = jacobian.gram()
            self.scale = self._matrix.diagonal().mean().expand(1)
        check_products(self._matrix)
        # Parameters that no row depends on have no scale: any will do.
        self._added = torch.where(self.scale > 0, self.scale, torch.ones_like(self.scale))
        self._factor = self._matrix

    def damp(self, damping: float) -> bool:
        """Factorise with a damping.

        Args:
            damping: lambda.

        Returns:
            Whether it could be: rounding makes the matrix indefinite where the damping is too small.
        """
        damped = self._matrix.clone()
        damped.diagonal().add_(damping * self._added)
        self._factor, failed = torch.linalg.cholesky_ex(damped)
        return self.agreed(not bool(failed))

    def agreed(self, answer: bool) -> bool:
        """What rank 0 says, where rounding could make others say something else."""
        if self._ranks is None:
            return answer
        told = torch.tensor([float(answer)], dtype=torch.float64, device=self._jacobian.device)
        self._ranks.broadcast_([told], source=0)
        return bool(told.item())

    def target(self, rows: Tensor) -> Tensor:
        """Bring rows to the space that is solved in: ``J^T r``, or in dual form the rows themselves.

        Args:
            rows: This process's, ``[R]``.

        Returns:
            ``[P]`` or ``[R]`` of all processes; not finite on any where the rows of one are not.
        """
        rows = rows.double()
        found = self._dense.T @ rows if self._primal else rows
        if self._ranks is None:
            return found
        if not self._primal:
            return torch.cat(self._ranks.gather(found))
        self._ranks.sum_([found])
        return found

    def solved(self, target: Tensor) -> Tensor:
        """Solve with the last damping.

        Args:
            target: From `target`.

        Returns:
            d, flat.
        """
        found = torch.cholesky_solve(target.unsqueeze(1), self._factor).squeeze(1)
        if self._ranks is not None:
            self._ranks.broadcast_([found], source=0)
        return found if self._primal else flatten(self._jacobian.vjp(found), self._jacobian).double()

    def moved(self, flat: Tensor) -> Tensor:
        """``J d`` of this process's rows."""
        if self._primal:
            return self._dense @ flat
        return self._local.jvp(unflatten(flat, self._jacobian)).double()

    def solution(self, flat: Tensor) -> Solution:
        """Wrap a direction."""
        norm = float(torch.linalg.vector_norm(flat))
        explicit = unflatten(flat, self._jacobian)
        floor = 32 * torch.finfo(self._jacobian.dtype).eps
        rank = min(self._jacobian.num_rows, len(flat))
        return Solution(self._jacobian, rank, None, floor, norm, norm, explicit=explicit)

    def _together(self) -> Tensor:
        """This process's rows in float64; with several processes all of them, or none, have theirs."""
        if self._ranks is None:
            return self._local.to_dense(torch.float64)
        return attempt_together(self._ranks, lambda: self._local.to_dense(torch.float64), self._jacobian.device)
