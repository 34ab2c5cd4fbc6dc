"""Solutions with symmetric positive definite matrices in batches: by Cholesky, and by Newton's iteration."""

import math
from typing import Any

import torch
from torch import Tensor

__all__ = ["newton_inverse", "newton_steps", "spd_solve"]

# What Newton's iteration leaves of I - V P when it counts as converged.
_CONVERGED = 1e-8


class _SPDSolve(torch.autograd.Function):
    """X = A^-1 B; the backward is one more solve with the same factor."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, rhs: Tensor) -> tuple[Tensor, Tensor]:
        # No check_errors: it would wait for the device. A matrix that has no factor gives NaN, for itself alone.
        factor, info = torch.linalg.cholesky_ex(matrix)
        factor = factor.masked_fill((info != 0)[..., None, None], math.nan)
        return torch.cholesky_solve(rhs, factor), factor

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
        solution, factor = output
        ctx.mark_non_differentiable(factor)
        ctx.save_for_backward(inputs[0], solution, factor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
        matrix, solution, factor = ctx.saved_tensors
        # With a graph through the factor's matrix only where somebody asks for second derivatives.
        grad_rhs = spd_solve(matrix, grad) if torch.is_grad_enabled() else torch.cholesky_solve(grad, factor)
        return -grad_rhs @ solution.mT, grad_rhs


def spd_solve(matrix: Tensor, rhs: Tensor) -> Tensor:
    r"""Solve :math:`A X = B` for symmetric positive definite matrices in a batch.

    Args:
        matrix: `[..., m, m]`, float32 or float64; only the lower triangles are read.
        rhs: `[..., m, k]`.

    Returns:
        `[..., m, k]`. NaN for each matrix that is not positive definite; the others are not touched by it, and nothing
        waits for the device. The gradient in A is :math:`-A^{-1} G X^T`, exact in symmetric directions.

    Example:
        >>> spd_solve(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), torch.ones(2, 1))
        tensor([[0.5000],
                [0.2500]])
    """
    solution, _ = _SPDSolve.apply(matrix, rhs)  # type: ignore[no-untyped-call]
    return solution  # type: ignore[no-any-return]


def newton_steps(condition: float) -> int:
    r"""Steps after which Newton's iteration has converged for every matrix of at most this condition number.

    The start :math:`V_0 = P / |P|_1^2` leaves :math:`1 - 1 / c^2` of the worst direction at most, where c is the ratio
    of the largest row sum to the smallest eigenvalue, and each step squares what is left.

    Args:
        condition: An upper bound of c, at least 1.

    Returns:
        The number of steps to leave at most 1e-8.

    Example:
        >>> newton_steps(1.0), newton_steps(4900.0)
        (5, 29)
    """
    return max(1, math.ceil(math.log2(-math.log(_CONVERGED)) + 2 * math.log2(condition)))


class _NewtonInverse(torch.autograd.Function):
    """V of steps that suffice; the backward is that of the inverse, at any order, since V itself is saved."""

    generate_vmap_rule = True

    @staticmethod
    def forward(matrix: Tensor, steps: int) -> Tensor:
        return _iterated(matrix, steps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        return -inverse.mT @ grad @ inverse.mT, None


def _iterated(matrix: Tensor, steps: int) -> Tensor:
    inverse = matrix / matrix.abs().sum(-1).amax(-1)[..., None, None].square()
    for _ in range(steps):
        inverse = 2 * inverse - inverse @ matrix @ inverse
    return inverse


def newton_inverse(matrix: Tensor, steps: int, *, converged: bool) -> Tensor:
    r"""Inverse of symmetric positive definite matrices by Newton's iteration.

    .. math:: V \leftarrow 2 V - V P V, \qquad V_0 = P / |P|_1^2

    Every matrix of a batch has a start of its own, so that no result depends on what else is in the batch.

    Args:
        matrix: `[..., m, m]`.
        steps: Number of steps.
        converged: Whether that many steps are known to suffice (see `newton_steps`). Then the gradient is that of the
            inverse, :math:`-V^T G V^T`, in the memory of V. If not, the gradient goes through every step: it is
            the gradient of what was computed, which is not yet the inverse.

    Returns:
        `[..., m, m]`.

    Example:
        >>> newton_inverse(torch.tensor([[2.0, 0.0], [0.0, 4.0]]), newton_steps(2.0), converged=True)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.2500]])
    """
    if not converged:
        return _iterated(matrix, steps)
    inverse: Tensor = _NewtonInverse.apply(matrix, steps)  # type: ignore[no-untyped-call]
    return inverse
