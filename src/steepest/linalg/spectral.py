"""Truncated, damped and fractional pseudo-inverses, through the spectrum of a Gram matrix."""

from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.errors import NonFiniteError

__all__ = ["Spectrum", "damped_solve", "range_finder", "spectral_filter", "symmetric_spectrum"]


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Singular values of J with the singular vectors of one side.

    Args:
        values: ``[n]``, singular values, largest first.
        vectors: ``[m, n]``, their singular vectors as columns.
    """

    values: Tensor
    vectors: Tensor


def symmetric_spectrum(gram: Tensor) -> Spectrum:
    """Singular values and one side's vectors of J, from ``J J^T`` or ``J^T J``.

    Args:
        gram: ``[n, n]``, symmetric and positive semidefinite up to rounding.

    Returns:
        The spectrum; eigenvalues that rounding made negative become zero.

    Raises:
        NonFiniteError: If the matrix holds NaN or infinity.
    """
    if not gram.isfinite().all():
        raise NonFiniteError(
            "The Gram of the per-sample gradients holds NaN or infinity, though the rows are finite. "
            "Lower the learning rate, or look for a layer whose gradient overflows."
        )
    eigenvalues, vectors = torch.linalg.eigh(gram)
    return Spectrum(eigenvalues.clamp(min=0).sqrt().flip(0), vectors.flip(1))


def spectral_filter(
    values: Tensor,
    *,
    rank: int | None = None,
    rtol: float = 0.0,
    damping: float | Tensor = 0.0,
    exponent: float = 1.0,
    floor: float = 0.0,
) -> tuple[Tensor, int]:
    r"""Inverse singular values after truncation and damping.

    .. math:: f(s) = s (s^2 + \lambda)^{-(1 + \alpha) / 2} \text{ for } s > \mathrm{rtol}\, s_{max}, \text{ else } 0

    With no damping that is :math:`s^{-\alpha}`.

    Args:
        values: ``[n]``, singular values, largest first.
        rank: How many to keep at most.
        rtol: Keep those above ``rtol`` times the largest.
        damping: lambda, in units of squared singular values.
        exponent: alpha; 1 is the pseudo-inverse, 1/2 the half-inverse.
        floor: Relative size below which a singular value is rounding and is never kept.

    Returns:
        ``[n]``, the filtered inverses, and how many are kept.
    """
    kept = values > values[0] * max(rtol, floor)
    if rank is not None:
        kept &= torch.arange(len(values), device=values.device) < rank
    safe = torch.where(kept, values, 1)
    inverse = safe * (safe.square() + damping) ** (-(1 + exponent) / 2)
    return torch.where(kept, inverse, 0), int(kept.sum())


def damped_solve(gram: Tensor, rhs: Tensor, damping: Tensor) -> Tensor | None:
    """Solve ``(gram + damping I) w = rhs`` by Cholesky.

    Args:
        gram: ``[n, n]``, positive semidefinite up to rounding.
        rhs: ``[n]``.
        damping: Scalar.

    Returns:
        ``[n]``, or None where the matrix is numerically indefinite.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if failed:
        return None
    return torch.cholesky_solve(rhs.unsqueeze(1), factor).squeeze(1)


def range_finder(matrix: Tensor, size: int, power_iterations: int, generator: torch.Generator) -> Tensor:
    """Orthonormal basis of the dominant column space (Halko, Martinsson, Tropp 2011, algorithm 4.4).

    Args:
        matrix: ``[m, n]``.
        size: Number of columns of the basis.
        power_iterations: Multiplications by ``A A^T``, each followed by an orthonormalisation.
        generator: Source of the random test matrix, on the CPU.

    Returns:
        ``[m, size]`` with orthonormal columns.
    """
    test = torch.randn(matrix.shape[1], size, generator=generator, dtype=torch.float64).to(matrix)
    basis: Tensor = torch.linalg.qr(matrix @ test).Q
    for _ in range(power_iterations):
        basis = torch.linalg.qr(matrix @ torch.linalg.qr(matrix.T @ basis).Q).Q
    return basis
