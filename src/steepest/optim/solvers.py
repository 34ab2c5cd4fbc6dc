"""How the conditions ``J d = R`` are solved: objects, so that an optimizer names its solver with all its settings."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from steepest._typing import Precision
from steepest._validation import check_choice, check_integer, check_real
from steepest.engine import Jacobian
from steepest.linalg import damped_solve, range_finder, spectral_filter
from steepest.optim.gram import FORMS, Form, Gram, Solution, unflatten

__all__ = [
    "AdaptiveSolver",
    "Damped",
    "RandomizedSVD",
    "SearchingSolver",
    "Solver",
    "Trial",
    "TruncatedEigh",
    "TruncatedSVD",
]


@runtime_checkable
class Solver(Protocol):
    """Anything that turns a Jacobian and a right-hand side into a direction."""

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve ``J d = rhs`` in this solver's sense."""


@runtime_checkable
class AdaptiveSolver(Solver, Protocol):
    """A solver that learns from step to step; what it learns is kept in the optimizer's state."""

    def adapt(
        self, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None, samples: Sequence[tuple[int, int]]
    ) -> Solution:
        """Solve as `solve` does, by the ``memory`` of the solution before; samples and rows of each, block by block."""


class Trial(Protocol):
    """What steps are tried with."""

    @property
    def rows(self) -> Tensor:
        """The rows before any step, of this process."""

    @property
    def before(self) -> float:
        """The sum of the squares of all processes' rows."""

    @property
    def samples(self) -> Sequence[tuple[int, int]]:
        """Number of samples and rows of each, block by block, of all processes."""

    def __call__(self, solution: Solution, length: float, /) -> float:
        """Move along a share of a direction; returns the sum of squares, and moves back if it has not fallen."""

    @property
    def rates(self) -> dict[str, float]:
        """The learning rate of every parameter that moves, by name."""

    def rows_at(self, solution: Solution, length: float, /) -> Tensor:
        """This process's rows at a share of a direction, whatever the learning rate."""


@runtime_checkable
class SearchingSolver(Solver, Protocol):
    """A solver that tries its steps out, and learns from how they went."""

    def search(self, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None, trial: Trial) -> tuple[Solution, bool]:
        """Try steps, by the ``memory`` of the solution before; returns the last one and whether it was accepted."""


def _check_truncation(solver: "TruncatedEigh | TruncatedSVD | RandomizedSVD") -> None:
    if solver.rank is not None:
        check_integer("rank", solver.rank, low=1)
    check_real("rtol", solver.rtol, low=0, high=1, open_high=True)
    check_real("exponent", solver.exponent, low=0)


@dataclass(frozen=True)
class TruncatedEigh:
    r"""Truncated pseudo-inverse through the eigenvalues of the smaller Gram.

    .. math:: d = V_k S_k^{-\alpha} U_k^T R = J^T U_k S_k^{-1-\alpha} U_k^T R, \qquad J = U S V^T

    Dual form (``J J^T``, R x R) while there are no more rows than parameters, primal form (``J^T J``, P x P) beyond.
    J is never formed in the dual form.

    Args:
        rank: Keep at most this many singular directions; None keeps all above ``rtol``.
        rtol: Keep singular values above ``rtol`` times the largest.
        exponent: alpha: 1 is the pseudo-inverse, 1/2 the half-inverse (arXiv 2203.10131).
        form: "auto" chooses by shape.
        precision: Precision of the Gram's products. "float32" is cheaper and leaves a noise floor near 3.4e-4.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import steepest as st
        >>> st.TruncatedEigh(rank=32, rtol=1e-4)
        TruncatedEigh(rank=32, rtol=0.0001, exponent=1.0, form='auto', precision='float64')
    """

    rank: int | None = None
    rtol: float = 1e-3
    exponent: float = 1.0
    form: Form = "auto"
    precision: Precision = "float64"

    def __post_init__(self) -> None:
        _check_truncation(self)
        check_choice("form", self.form, FORMS)
        check_choice("precision", self.precision, ("float64", "float32"))

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve by the truncated spectrum.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.

        Returns:
            The direction with the spectrum.
        """
        gram = Gram(jacobian, rhs, self.form, self.precision)
        return gram.solve(rank=self.rank, rtol=self.rtol, exponent=self.exponent)


@dataclass(frozen=True)
class Damped:
    r"""Tikhonov-regularised solution, all directions kept.

    .. math:: d = J^T (J J^T + \lambda I)^{-1} R, \qquad \lambda = \mathrm{damping} \times
        (\text{mean or largest eigenvalue of } J J^T)

    With ``relative_to="mean"`` and exponent 1 one Cholesky factorisation is all it takes, several times cheaper than
    the eigenvalues; then no spectrum is reported.

    Args:
        damping: Relative damping, above 0.
        relative_to: The eigenvalue of the Gram that ``damping`` multiplies; the mean is the trace divided by R.
        exponent: alpha in ``V S (S^2 + lambda)^(-(1 + alpha) / 2) U^T R``.
        form: "auto" chooses dual or primal by shape.
        precision: Precision of the Gram's products.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import steepest as st
        >>> st.Damped(1e-2).relative_to
        'mean'
    """

    damping: float = 1e-2
    relative_to: Literal["mean", "max"] = "mean"
    exponent: float = 1.0
    form: Form = "auto"
    precision: Precision = "float64"

    def __post_init__(self) -> None:
        check_real("damping", self.damping, low=0, open_low=True)
        check_choice("relative_to", self.relative_to, ("mean", "max"))
        check_real("exponent", self.exponent, low=0)
        check_choice("form", self.form, FORMS)
        check_choice("precision", self.precision, ("float64", "float32"))

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve the damped conditions.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.

        Returns:
            The direction; with the spectrum where it was needed.
        """
        gram = Gram(jacobian, rhs, self.form, self.precision)
        mean = gram.matrix.diagonal().sum() / jacobian.num_rows
        if self.relative_to == "mean" and self.exponent == 1:
            solved = damped_solve(gram.matrix, gram.rhs, self.damping * mean)
            if solved is not None:
                return gram.solution(solved, len(solved), None)
        scale = mean if self.relative_to == "mean" else None
        return gram.solve(damping=self.damping, scale=scale, exponent=self.exponent)


@dataclass(frozen=True)
class TruncatedSVD:
    """Truncated pseudo-inverse by the singular value decomposition of J itself (arXiv 2604.01279, the paper's form).

    J is materialised, R x P numbers in float64: the slow and exact reference, with no squared condition number.

    Args:
        rank: Keep at most this many singular directions; None keeps all above ``rtol``.
        rtol: Keep singular values above ``rtol`` times the largest.
        exponent: Spectral exponent, as in `TruncatedEigh`.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import steepest as st
        >>> st.TruncatedSVD(rank=16)
        TruncatedSVD(rank=16, rtol=0.001, exponent=1.0)
    """

    rank: int | None = None
    rtol: float = 1e-3
    exponent: float = 1.0

    def __post_init__(self) -> None:
        _check_truncation(self)

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve by the singular value decomposition.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.

        Returns:
            The direction with the spectrum.
        """
        left, values, right = torch.linalg.svd(jacobian.to_dense(torch.float64), full_matrices=False)
        return _from_svd(self, jacobian, (left.T @ rhs.double(), values, right))


@dataclass(frozen=True)
class RandomizedSVD:
    """Truncated pseudo-inverse by a randomised decomposition: cost O(R P k) (arXiv 2604.01279; Halko et al. 2011).

    J is materialised in the parameters' own precision.

    Args:
        rank: Number of singular directions k.
        rtol: Keep singular values above ``rtol`` times the largest.
        exponent: Spectral exponent, as in `TruncatedEigh`.
        oversampling: Additional random directions.
        power_iterations: Passes that sharpen the subspace where the spectrum falls slowly.
        seed: Seed of the random test matrix, the same in every step.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import steepest as st
        >>> st.RandomizedSVD(rank=8).oversampling
        8
    """

    rank: int
    rtol: float = 1e-3
    exponent: float = 1.0
    oversampling: int = 8
    power_iterations: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        _check_truncation(self)
        check_integer("rank", self.rank, low=1)
        check_integer("oversampling", self.oversampling, low=0)
        check_integer("power_iterations", self.power_iterations, low=0)
        check_integer("seed", self.seed, low=0)

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve in the dominant subspace.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.

        Returns:
            The direction with the leading part of the spectrum.
        """
        matrix = jacobian.to_dense()
        size = min(self.rank + self.oversampling, *matrix.shape)
        basis = range_finder(matrix, size, self.power_iterations, torch.Generator().manual_seed(self.seed))
        left, values, right = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        return _from_svd(self, jacobian, (left.T @ (basis.T @ rhs.to(basis.dtype)), values, right))


def _from_svd(
    solver: TruncatedSVD | RandomizedSVD, jacobian: Jacobian, parts: tuple[Tensor, Tensor, Tensor]
) -> Solution:
    """Apply the filter to ``(U^T R, S, V^T)``."""
    projected, values, right = parts
    floor = max(jacobian.num_rows, jacobian.num_parameters) * torch.finfo(values.dtype).eps
    inverse, kept = spectral_filter(values, rank=solver.rank, rtol=solver.rtol, exponent=solver.exponent, floor=floor)
    coefficients = inverse * projected
    norm = float(torch.linalg.vector_norm(coefficients))
    explicit = unflatten(coefficients @ right, jacobian)
    noise_floor = max(floor, 32 * torch.finfo(jacobian.dtype).eps)
    return Solution(jacobian, kept, values.double(), noise_floor, norm, norm, explicit=explicit)
