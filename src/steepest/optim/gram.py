"""The smaller of the two Grams of a Jacobian, and directions from solutions in its space."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from steepest._typing import Precision
from steepest.engine import Jacobian
from steepest.errors import NonFiniteError
from steepest.linalg import spectral_filter, symmetric_spectrum

__all__ = ["FORMS", "Form", "Gram", "Solution", "check_products", "flatten", "unflatten"]

Form = Literal["auto", "dual", "primal"]
FORMS = ("auto", "dual", "primal")


@dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found: a direction d, explicitly or as ``J^T w``.

    Args:
        jacobian: J.
        rank: Number of singular directions used.
        spectrum: Singular values of J, largest first, float64; None where the solver needs none.
        noise_floor: Relative size below which singular values are rounding.
        norm: Euclidean norm of d.
        magnitude: Bound on every number that forming d meets.
        weights: ``[R]``, w; None where d is explicit.
        explicit: d for each parameter, by qualified name; None where it is ``J^T w``.
        step: Share of d that the solver advises to take, on top of the learning rate.
        damping: Absolute damping that it chose, in squared singular values; None where it chooses none.
        memory: What a solver that learns from step to step has to be given in the next one.
    """

    jacobian: Jacobian
    rank: int
    spectrum: Tensor | None
    noise_floor: float
    norm: float
    magnitude: float
    weights: Tensor | None = None
    explicit: dict[str, Tensor] | None = None
    step: float = 1.0
    damping: float | None = None
    memory: Tensor | None = None

    def direction(self) -> dict[str, Tensor]:
        """Return d for each parameter, by qualified name."""
        if self.explicit is not None:
            return self.explicit
        return self.jacobian.vjp(cast("Tensor", self.weights))


class Gram:
    """The smaller of ``J J^T`` (dual) and ``J^T J`` (primal), and the way from its space to a direction.

    Args:
        jacobian: J.
        rhs: ``[R]``.
        form: Which of the two.
        precision: Precision of the products.

    Attributes:
        primal: Whether it is ``J^T J``.
        matrix: The Gram.
        rhs: The right-hand side in the Gram's space.
        noise_floor: Relative size below which singular values are rounding.
    """

    def __init__(self, jacobian: Jacobian, rhs: Tensor, form: Form, precision: Precision) -> None:
        self._jacobian = jacobian
        dtype = torch.float64 if precision == "float64" else torch.float32
        self.primal = form == "primal" or (form == "auto" and jacobian.num_rows > jacobian.num_parameters)
        if self.primal:
            self.matrix, self.rhs = jacobian.normal_equations(rhs, dtype)
        else:
            self.matrix, self.rhs = jacobian.gram(precision), rhs.to(dtype)
        self.noise_floor = max(torch.finfo(dtype).eps ** 0.5, 32 * torch.finfo(jacobian.dtype).eps)

    def solution(self, solved: Tensor, rank: int, spectrum: Tensor | None) -> Solution:
        """Wrap a solution in the Gram's space."""
        if self.primal:
            norm = float(torch.linalg.vector_norm(solved))
            explicit = unflatten(solved, self._jacobian)
            return Solution(self._jacobian, rank, spectrum, self.noise_floor, norm, norm, explicit=explicit)
        norm = float((solved @ (self.matrix @ solved)).clamp(min=0).sqrt())  # |J^T w|, without forming it
        magnitude = float(solved.abs().amax() * self.matrix.diagonal().amax().sqrt())
        return Solution(self._jacobian, rank, spectrum, self.noise_floor, norm, magnitude, weights=solved)

    def solve(
        self,
        *,
        rank: int | None = None,
        rtol: float = 0.0,
        damping: float = 0.0,
        scale: Tensor | None = None,
        exponent: float = 1.0,
    ) -> Solution:
        """Filter the spectrum.

        Args:
            rank: How many directions to keep at most.
            rtol: Relative truncation.
            damping: Relative damping.
            scale: What ``damping`` is relative to; the largest eigenvalue by default.
            exponent: Spectral exponent.

        Returns:
            The direction with the spectrum.
        """
        spectrum = symmetric_spectrum(self.matrix)
        values, vectors = spectrum.values, spectrum.vectors
        absolute = damping * (values[0].square() if scale is None else scale)
        # Below this the eigenvalues of the Gram are rounding, whatever rtol says.
        floor = (len(values) * torch.finfo(values.dtype).eps) ** 0.5 if damping == 0 else 0.0
        inverse, kept = spectral_filter(values, rank=rank, rtol=rtol, damping=absolute, exponent=exponent, floor=floor)
        # Both forms apply f(s) / s to the projected right-hand side: J^T U (f / s) U^T R = V (f / s) V^T J^T R.
        weights = torch.where(inverse > 0, inverse / values, 0)
        solved = vectors @ (weights * (vectors.T @ self.rhs))
        return self.solution(solved, kept, values.double())


def check_products(products: Tensor) -> None:
    """Refuse rows whose gradients are not finite.

    Args:
        products: Of the gradients, all of them or their sum.

    Raises:
        NonFiniteError: If they hold NaN or infinity.
    """
    if not bool(products.isfinite().all()):
        raise NonFiniteError(
            "The products of the per-sample gradients hold NaN or infinity, though the rows are finite; parameters "
            "and optimizer state are unchanged. Remedy: look for an operation of the model or the loss whose "
            "derivative is infinite, such as a root at zero."
        )


def unflatten(vector: Tensor, jacobian: Jacobian) -> dict[str, Tensor]:
    """Cut a vector of parameter space into tensors, in the order of `Jacobian.to_dense`.

    Args:
        vector: ``[P]``.
        jacobian: Whose parameters.

    Returns:
        A tensor of the parameter's shape for each name, in the Jacobian's dtype.
    """
    shapes = jacobian.shapes
    parts = vector.to(jacobian.dtype).split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def flatten(tensors: Mapping[str, Tensor], jacobian: Jacobian) -> Tensor:
    """Join tensors to a vector of parameter space, in the order of `Jacobian.to_dense`.

    Args:
        tensors: A tensor of the parameter's shape for each name.
        jacobian: Whose parameters.

    Returns:
        ``[P]``.
    """
    return torch.cat([tensors[name].reshape(-1) for name in jacobian.shapes])
