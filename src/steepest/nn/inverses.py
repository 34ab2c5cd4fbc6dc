"""How softmax-free attention inverts the kernel matrix of its landmarks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.linalg.spd import newton_inverse, newton_steps, spd_solve

__all__ = ["CholeskyInverse", "Inverse", "NewtonInverse"]


def _with_ridge(kernel: Tensor, ridge: float) -> Tensor:
    return kernel + ridge * torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)


@dataclass(frozen=True)
class CholeskyInverse:
    r"""Solve :math:`(A + \rho I) X = B` by a Cholesky factorisation.

    The gradient is exact, nothing waits for the device, and no matrix is touched by the others of its batch.

    Args:
        ridge: :math:`\rho`, relative to the mean diagonal entry of A, which is 1. In float32 keep it above about
            1e-7 m: below, rounding can leave a matrix without a factorisation, and its solution is NaN.

    Raises:
        InvalidOptionError: If the ridge is no number above 0.

    Example:
        >>> CholeskyInverse(ridge=1.0).solve(torch.eye(2), torch.ones(2, 1))
        tensor([[0.5000],
                [0.5000]])
    """

    ridge: float = 1e-2

    def __post_init__(self) -> None:
        check_real("ridge", self.ridge, low=0.0, open_low=True)

    def solve(self, kernel: Tensor, rhs: Tensor) -> Tensor:
        """Solve with the kernel matrix.

        Args:
            kernel: A, `[..., m, m]`, symmetric and positive semidefinite, with a diagonal of 1.
            rhs: B, `[..., m, k]`.

        Returns:
            X, `[..., m, k]`.
        """
        return spd_solve(_with_ridge(kernel, self.ridge), rhs)


@dataclass(frozen=True)
class NewtonInverse:
    r"""Multiply by the inverse of :math:`A + \rho I` from Newton's iteration, as the papers do (2110.11945, 3.3).

    Only products of matrices, but about 2 m steps of them where Cholesky needs one solve: for comparisons with the
    papers, and for devices without a factorisation.

    Differs from the papers' code: every matrix has a start of its own, so that the output for an image does not
    depend on the others in the batch. Where the steps are known to suffice for any A (see `guaranteed_steps`), the
    gradient is that of the inverse; with fewer it goes through every step, since the formula for the inverse is wrong
    for what is not yet one.

    Args:
        ridge: :math:`\rho`, relative to the mean diagonal entry of A, which is 1. In float32, rounding leaves a
            relative error of up to about 1e-7 m / ridge, where a solve by Cholesky leaves far less.
        steps: Number of steps (the papers take 20); None takes what suffices for any A of its size.

    Raises:
        InvalidOptionError: If the ridge is no number above 0, or steps no integer above 0.

    Example:
        >>> NewtonInverse(ridge=1.0).solve(torch.eye(2), torch.ones(2, 1))
        tensor([[0.5000],
                [0.5000]])
        >>> NewtonInverse().guaranteed_steps(49)
        29
    """

    ridge: float = 1e-2
    steps: int | None = None

    def __post_init__(self) -> None:
        check_real("ridge", self.ridge, low=0.0, open_low=True)
        if self.steps is not None:
            check_integer("steps", self.steps, low=1)

    def guaranteed_steps(self, size: int) -> int:
        """Steps after which the iteration has converged for any kernel matrix of this size.

        Args:
            size: m, the number of landmarks.

        Returns:
            The number of steps.
        """
        return newton_steps((size + self.ridge) / self.ridge)

    def solve(self, kernel: Tensor, rhs: Tensor) -> Tensor:
        """Multiply by the inverse of the kernel matrix.

        Args:
            kernel: A, `[..., m, m]`, symmetric and positive semidefinite, with a diagonal of 1.
            rhs: B, `[..., m, k]`.

        Returns:
            X, `[..., m, k]`.
        """
        enough = self.guaranteed_steps(kernel.shape[-1])
        steps = self.steps or enough
        return newton_inverse(_with_ridge(kernel, self.ridge), steps, converged=steps >= enough) @ rhs


Inverse = CholeskyInverse | NewtonInverse
