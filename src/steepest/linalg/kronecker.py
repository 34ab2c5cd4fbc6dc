r"""How the block :math:`A \otimes S` of a layer is decomposed: objects, so that an optimizer names its solver."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from steepest.linalg.decompositions import CorrectedEigen, Decomposition, KroneckerEigen, KroneckerInverse, Placed
from steepest.linalg.factors import (
    DecompositionError,
    damped_pi,
    eigenbasis,
    inverse,
    second_moment,
    symmetrised,
)

__all__ = [
    "Cholesky",
    "Decomposition",
    "DecompositionError",
    "Eigenbasis",
    "EigenbasisCorrected",
    "KroneckerSolver",
    "Placed",
    "damped_pi",
    "second_moment",
]

INPUT, GRAD = "input factor A", "gradient factor S"


@runtime_checkable
class KroneckerSolver(Protocol):
    """Anything that decomposes the block of a layer, and makes a decomposition again from its tensors."""

    def decompose(
        self, input_factor: Tensor, grad_factor: Tensor, damping: float | Tensor, previous: Decomposition | None = None
    ) -> Decomposition:
        """Decompose ``A (x) S``; ``previous`` is the decomposition to be replaced, if there is one."""

    def restore(self, tensors: Mapping[str, Tensor]) -> Decomposition:
        """Make a decomposition again from its `Decomposition.tensors`."""


@dataclass(frozen=True)
class Eigenbasis:
    r"""Exact damping :math:`(A \otimes S + \lambda I)^{-1}` in the eigenbasis of the factors.

    With :math:`A = U_A \operatorname{diag}(a) U_A^T` and :math:`S = U_S \operatorname{diag}(s) U_S^T`:

    .. math:: M^{-1} G = U_S \Big[\frac{U_S^T G U_A}{s a^T + \lambda}\Big] U_A^T

    Damping is applied at use, so that a schedule acts at once. Without damping it is the pseudo-inverse.

    Example:
        >>> import torch
        >>> from steepest.linalg.kronecker import Eigenbasis
        >>> block = Eigenbasis().decompose(torch.diag(torch.tensor([1.0, 3.0])), torch.tensor([[2.0]]), damping=0.0)
        >>> block.precondition(torch.tensor([[4.0, 4.0]]), damping=2.0)  # 4 / (1 * 2 + 2), 4 / (3 * 2 + 2)
        tensor([[1.0000, 0.5000]])
    """

    def decompose(
        self, input_factor: Tensor, grad_factor: Tensor, damping: float | Tensor, previous: Decomposition | None = None
    ) -> KroneckerEigen:
        """Decompose the block; waits for the device.

        Args:
            input_factor: A, ``[m, m]``, or its diagonal ``[m]``.
            grad_factor: S, ``[n, n]``.
            damping: Not used: it is given at use.
            previous: Not used.

        Returns:
            The eigenbasis.
        """
        a, s = _prepared(input_factor, grad_factor)
        return KroneckerEigen(*eigenbasis(a, INPUT), *eigenbasis(s, GRAD))

    def restore(self, tensors: Mapping[str, Tensor]) -> KroneckerEigen:
        """Make the eigenbasis again from its tensors."""
        return KroneckerEigen.from_tensors(tensors)


@dataclass(frozen=True)
class EigenbasisCorrected:
    r"""EKFAC (arXiv 1806.03884): the eigenbasis of the factors, its diagonal measured on the gradients themselves.

    .. math:: M = (U_A \otimes U_S)(\operatorname{diag}(D) + \lambda I)(U_A \otimes U_S)^T, \qquad
        D = \mathrm{E}\big[(U_S^T G_n U_A)^{\circ 2}\big]

    D starts at the products of the eigenvalues, which is KFAC, and follows `CorrectedEigen.observed`. Where the basis
    turns, D is carried over to the new one (`CorrectedEigen.turned`).

    Example:
        >>> import torch
        >>> from steepest.linalg.kronecker import EigenbasisCorrected
        >>> block = EigenbasisCorrected().decompose(torch.eye(2), torch.eye(1), damping=0.0)
        >>> block.observed(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]), decay=0.5).moment
        tensor([[ 5.0000, 18.5000]])
    """

    def decompose(
        self, input_factor: Tensor, grad_factor: Tensor, damping: float | Tensor, previous: Decomposition | None = None
    ) -> CorrectedEigen:
        """Decompose the block; waits for the device.

        Args:
            input_factor: A, ``[m, m]``, or its diagonal ``[m]``.
            grad_factor: S, ``[n, n]``.
            damping: Not used: it is given at use.
            previous: The decomposition to be replaced, whose moment is carried over.

        Returns:
            The eigenbasis with a second moment.
        """
        start = Eigenbasis().decompose(input_factor, grad_factor, damping)
        if isinstance(previous, CorrectedEigen):
            return previous.turned(start.grad_basis, start.input_basis)
        return CorrectedEigen(start.input_basis, start.grad_basis, start.curvature())

    def restore(self, tensors: Mapping[str, Tensor]) -> CorrectedEigen:
        """Make the eigenbasis and its moment again from their tensors."""
        return CorrectedEigen.from_tensors(tensors)


@dataclass(frozen=True)
class Cholesky:
    r"""Factored damping by Cholesky: several times cheaper to decompose than `Eigenbasis`, and not the same damping.

    .. math:: M = (A + \pi \sqrt\lambda I) \otimes (S + \tfrac{\sqrt\lambda}{\pi} I), \qquad
        \pi = \sqrt{\frac{\operatorname{tr}(A) / m}{\operatorname{tr}(S) / n}}

    (arXiv 1503.05671, section 6.3). A changed damping acts at the next decomposition.

    Example:
        >>> import torch
        >>> from steepest.linalg.kronecker import Cholesky
        >>> block = Cholesky().decompose(torch.eye(2), torch.eye(1), damping=1.0)
        >>> block.precondition(torch.tensor([[4.0, 8.0]]), damping=1.0)  # (1 + 1) (x) (1 + 1)
        tensor([[1., 2.]])
    """

    def decompose(
        self, input_factor: Tensor, grad_factor: Tensor, damping: float | Tensor, previous: Decomposition | None = None
    ) -> KroneckerInverse:
        """Decompose the block; waits for the device.

        Args:
            input_factor: A, ``[m, m]``, or its diagonal ``[m]``.
            grad_factor: S, ``[n, n]``.
            damping: lambda.
            previous: Not used.

        Returns:
            The inverses of the damped A and S.
        """
        a, s = _prepared(input_factor, grad_factor)
        pi, root = damped_pi(a, s), damping**0.5
        shift_a, shift_s = (pi * root).to(a), (root / pi).to(s)
        inverses = inverse(_shifted(a, shift_a), INPUT), inverse(_shifted(s, shift_s), GRAD)
        return KroneckerInverse(a, s, *inverses, shift_a, shift_s)

    def restore(self, tensors: Mapping[str, Tensor]) -> KroneckerInverse:
        """Make the inverses again from their tensors."""
        return KroneckerInverse.from_tensors(tensors)


def _prepared(input_factor: Tensor, grad_factor: Tensor) -> tuple[Tensor, Tensor]:
    """Both factors checked, symmetric and of one dtype."""
    a, s = symmetrised(input_factor, INPUT), symmetrised(grad_factor, GRAD)
    dtype = torch.promote_types(a.dtype, s.dtype)
    return a.to(dtype), s.to(dtype)


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    """Return ``matrix + shift * I``."""
    if matrix.ndim == 1:
        return matrix + shift
    shifted = matrix.clone()
    shifted.diagonal().add_(shift)
    return shifted
