r"""Decomposed blocks :math:`M` of a layer's curvature: how they are damped at use, solved and measured with.

A gradient is a matrix G ``[n, m]``: n outputs, m inputs, the bias joined as the last input column. With its columns
stacked, :math:`(A \otimes S)\, \mathrm{vec}(G) = \mathrm{vec}(S G A)`. F is the block A (x) S, M the same with damping.

A of an embedding, whose inputs are one-hot, is diagonal: it is a vector here, and so are its eigenbasis (ones) and its
inverse.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError
from steepest.linalg.factors import product, second_moment, transposed

__all__ = ["CorrectedEigen", "Decomposition", "EigenDecomposition", "KroneckerEigen", "KroneckerInverse", "Placed"]


@dataclass(frozen=True, eq=False)
class Placed:
    r"""One gradient a as a damped block sees it; both are linear in the gradient.

    .. math:: a^T M^{-1} b = \sum x_a \circ w_b

    Args:
        vector: x, ``[..., n, m]``: the gradient in some orthonormal basis.
        dual: w, of the same shape: the solution of M in that basis.
    """

    vector: Tensor
    dual: Tensor


class Decomposition(ABC):
    """A decomposed block: immutable, made of plain tensors. Nothing in its methods waits for a device."""

    @abstractmethod
    def place(self, gradient: Tensor, damping: float | Tensor) -> Placed:
        """Return all that inner products with the inverse of M need of a gradient ``[..., n, m]``: two products."""

    @abstractmethod
    def image(self, vector: Tensor, damping: float | Tensor, *, damped: bool = True) -> Tensor:
        """Return y of a placed gradient, with which ``b^T M a``, or ``b^T F a``, is the sum of ``x_b * y_a``."""

    @abstractmethod
    def direction(self, dual: Tensor) -> Tensor:
        """Return ``M^-1 G``, ``[..., n, m]``, from the dual of G, or from any combination of duals."""

    def precondition(self, gradient: Tensor, damping: float | Tensor) -> Tensor:
        """Return ``M^-1 G``."""
        return self.direction(self.place(gradient, damping).dual)

    def observed(self, inputs: Tensor, output_grads: Tensor, decay: float) -> Self:
        """Return the decomposition after a batch of ``[N, T, m]`` and ``[N, T, n]``; itself if it learns nothing."""
        return self

    def tensors(self) -> dict[str, Tensor]:
        """Return all that it is made of, for a state_dict."""
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Make it again from what `tensors` returned.

        Args:
            tensors: By name.

        Returns:
            The same decomposition.

        Raises:
            InvalidOptionError: If they belong to another kind of decomposition.
        """
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if set(tensors) != names:
            raise InvalidOptionError(
                f"The saved decomposition holds {sorted(tensors)}, and {cls.__name__} needs {sorted(names)}: "
                "use the solver that the state was saved with."
            )
        return cls(**tensors)


class EigenDecomposition(Decomposition):
    r"""A block :math:`(U_A \otimes U_S)\operatorname{diag}(D)(U_A \otimes U_S)^T` in a Kronecker eigenbasis."""

    input_basis: Tensor
    grad_basis: Tensor

    @abstractmethod
    def curvature(self) -> Tensor:
        """Return the diagonal D, ``[n, m]``, without damping."""

    @abstractmethod
    def resolved(self) -> Tensor:
        """Return ``[n, m]``: where D is more than rounding."""

    def inverse_weights(self, damping: float | Tensor) -> Tensor:
        """Return ``1 / (D + damping)``; without damping, 0 where D is nothing but rounding (the pseudo-inverse)."""
        total = self.curvature() + damping
        if isinstance(damping, Tensor) or damping <= 0:  # a number above 0 needs no look at what is resolved
            total = torch.where(self.resolved() | (damping > 0), total, torch.inf)
        return total.clamp(min=torch.finfo(total.dtype).tiny).reciprocal()

    def place(self, gradient: Tensor, damping: float | Tensor) -> Placed:
        """Return ``Z = U_S^T G U_A`` and that over ``D + damping``."""
        vector = product(self.grad_basis.T, gradient.to(self.grad_basis.dtype), self.input_basis)
        return Placed(vector, vector * self.inverse_weights(damping))

    def image(self, vector: Tensor, damping: float | Tensor, *, damped: bool = True) -> Tensor:
        """Return ``(D + damping) * Z``: M is diagonal here, and no product is needed."""
        curvature = self.curvature()
        return vector * (curvature + damping if damped else curvature)

    def direction(self, dual: Tensor) -> Tensor:
        """Return ``U_S W U_A^T``: two products."""
        return product(self.grad_basis, dual, transposed(self.input_basis))


@dataclass(frozen=True, eq=False)
class KroneckerEigen(EigenDecomposition):
    """The eigenbasis of A and S with the products of their eigenvalues.

    Args:
        input_values: Eigenvalues of A, ``[m]``.
        input_basis: U_A, ``[m, m]``, or ones ``[m]`` of a diagonal A.
        grad_values: Eigenvalues of S, ``[n]``.
        grad_basis: U_S, ``[n, n]``.
    """

    input_values: Tensor
    input_basis: Tensor
    grad_values: Tensor
    grad_basis: Tensor

    def curvature(self) -> Tensor:
        """Return the products of the eigenvalues."""
        return torch.outer(self.grad_values, self.input_values)

    def resolved(self) -> Tensor:
        """Return where both eigenvalues are more than the rounding of their factor."""
        grad = self.grad_values > _rounding(self.grad_values, len(self.grad_values))
        # The entries of a diagonal factor are no result of a decomposition.
        least = 0 if self.input_basis.ndim == 1 else _rounding(self.input_values, len(self.input_values))
        return grad.unsqueeze(1) & (self.input_values > least)


@dataclass(frozen=True, eq=False)
class CorrectedEigen(EigenDecomposition):
    """The eigenbasis of A and S with a running second moment of the gradient in it (EKFAC, arXiv 1806.03884).

    Args:
        input_basis: U_A, ``[m, m]``, or ones ``[m]`` of a diagonal A.
        grad_basis: U_S, ``[n, n]``.
        moment: D, ``[n, m]``.
    """

    input_basis: Tensor
    grad_basis: Tensor
    moment: Tensor

    def curvature(self) -> Tensor:
        """Return the second moment."""
        return self.moment

    def resolved(self) -> Tensor:
        """Return where the moment is more than rounding of the largest."""
        if self.input_basis.ndim == 1:  # every column has been measured for itself
            return self.moment > _rounding(self.moment, len(self.moment), column=True)
        return self.moment > _rounding(self.moment, max(self.moment.shape))

    def observed(self, inputs: Tensor, output_grads: Tensor, decay: float) -> "CorrectedEigen":
        """Return the decomposition with the moment ``decay * D + (1 - decay) * (second moment of the batch)``.

        Args:
            inputs: x, ``[N, T, m]``, bias joined.
            output_grads: g, ``[N, T, n]``, of one sample's loss each.
            decay: Share of the past, in [0, 1].

        Returns:
            A new decomposition in the same basis.
        """
        return self.blended(second_moment(self.grad_basis, self.input_basis, inputs, output_grads), decay)

    def blended(self, moment: Tensor, decay: float) -> "CorrectedEigen":
        """Return the decomposition with ``decay * D + (1 - decay) * moment``."""
        return CorrectedEigen(self.input_basis, self.grad_basis, torch.lerp(moment, self.moment, decay))

    def turned(self, grad_basis: Tensor, input_basis: Tensor) -> "CorrectedEigen":
        r"""Return the same block's diagonal in another basis, where a refresh of the factors turned it.

        .. math:: D' = (R_S \circ R_S)\, D\, (R_A \circ R_A)^T, \qquad R_S = U_S'^T U_S, \quad R_A = U_A'^T U_A

        Args:
            grad_basis: New U_S, ``[n, n]``.
            input_basis: New U_A, ``[m, m]``.

        Returns:
            The decomposition in the new basis; the trace stays.
        """
        grad = product(grad_basis.T, self.grad_basis).square()
        input_ = product(transposed(input_basis), self.input_basis).square()
        return CorrectedEigen(input_basis, grad_basis, product(grad, self.moment, transposed(input_)))


@dataclass(frozen=True, eq=False)
class KroneckerInverse(Decomposition):
    r"""Inverses of both factors of :math:`M = (A + \pi\sqrt\lambda I) \otimes (S + \sqrt\lambda / \pi\, I)`.

    The damping is that of the decomposition: the one given at use is ignored. A and S are kept for the metric.

    Args:
        input_factor: A, ``[m, m]``, or its diagonal ``[m]``.
        grad_factor: S, ``[n, n]``.
        input_inverse: Inverse of the damped A, of the same shape.
        grad_inverse: Inverse of the damped S, ``[n, n]``.
        input_shift: Damping added to A, 0-dimensional.
        grad_shift: Damping added to S, 0-dimensional.
    """

    input_factor: Tensor
    grad_factor: Tensor
    input_inverse: Tensor
    grad_inverse: Tensor
    input_shift: Tensor
    grad_shift: Tensor

    def place(self, gradient: Tensor, damping: float | Tensor) -> Placed:
        """Return the gradient itself and ``M^-1 G``."""
        gradient = gradient.to(self.grad_inverse.dtype)
        return Placed(gradient, product(self.grad_inverse, gradient, self.input_inverse))

    def image(self, vector: Tensor, damping: float | Tensor, *, damped: bool = True) -> Tensor:
        """Return ``M G``, or ``S G A``: two products."""
        left = product(self.grad_factor, vector)
        left = torch.addcmul(left, self.grad_shift, vector) if damped else left
        image = product(left, self.input_factor)
        return torch.addcmul(image, self.input_shift, left) if damped else image

    def direction(self, dual: Tensor) -> Tensor:
        """Return the dual as it is."""
        return dual


def _rounding(values: Tensor, size: int, *, column: bool = False) -> Tensor:
    """Size below which values computed beside the largest of them, or of their column, are rounding."""
    return (values.amax(0) if column else values.amax()) * (size * torch.finfo(values.dtype).eps)
