"""Orthogonal matching pursuit with weights that are never negative, on gradients that are outer products."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.linalg.factors import exact_dtype
from steepest.selection.features import rescale_, unheard

__all__ = ["GrowingCholesky", "Matched", "pursue"]

# A column that lies in the span of those before it leaves a pivot of pure rounding.
DEPENDENT = 1e-10
CHUNK = 8192


@dataclass(frozen=True, eq=False)
class Matched:
    """What a pursuit found.

    Args:
        chosen: ``[m]``, int64: positions, in the order in which they joined for good.
        weights: ``[m]``, float64, above zero: the target is about the sum of the chosen columns times these.
        residual: Norm of what is left of the target, over its own.
        projections: ``[n]``, float32: inner product of every column with the target over the target's norm.
        dropped: How many columns left again, because their weights would have been negative.
    """

    chosen: Tensor
    weights: Tensor
    residual: float
    projections: Tensor
    dropped: int


class GrowingCholesky:
    """Cholesky factor of a matrix that gains a last row and column, or loses any, one at a time.

    Args:
        limit: Largest size.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = limit
        self._factor = torch.eye(min(limit, 64), dtype=torch.float64, device="cpu")

    def append(self, column: Tensor, diagonal: float) -> bool:
        """Add a row and column.

        Args:
            column: ``[size]``: the new column above its diagonal entry.
            diagonal: That entry.

        Returns:
            False, with nothing changed, if the matrix would be singular up to rounding.
        """
        if self.size == len(self._factor):
            grown = torch.eye(min(self._limit, 2 * self.size), dtype=torch.float64, device="cpu")
            grown[: self.size, : self.size] = self._factor
            self._factor = grown
        row = self._solve(column, transposed=False)
        pivot = diagonal - float(row @ row)
        if pivot <= DEPENDENT * diagonal:
            return False
        self._factor[self.size, : self.size] = row
        self._factor[self.size, self.size] = math.sqrt(pivot)
        self.size += 1
        return True

    def remove(self, at: int) -> None:
        r"""Take out a row and column.

        What stays below has the factor of :math:`L L^T + l l^T = L (I + p p^T) L^T`, with :math:`p = L^{-1} l`, and
        the factor of the middle is known: with :math:`t_j = 1 + p_1^2 + \dots + p_j^2` its diagonal is
        :math:`\sqrt{t_j / t_{j-1}}`, its entries below are :math:`p_i p_j / \sqrt{t_j t_{j-1}}`.

        Args:
            at: Which.
        """
        size, factor = self.size, self._factor
        lower, column = factor[at + 1 : size, at + 1 : size].clone(), factor[at + 1 : size, at].clone()
        p = torch.linalg.solve_triangular(lower, column.unsqueeze(1), upper=False).squeeze(1)
        after = 1 + p.square().cumsum(0)
        before = after - p.square()
        tails = (lower * p).flip(1).cumsum(1).flip(1)  # sums over columns i >= j
        tails = torch.cat([tails[:, 1:], tails.new_zeros(len(tails), 1)], 1)
        factor[at : size - 1, :at] = factor[at + 1 : size, :at].clone()
        factor[at : size - 1, at : size - 1] = lower * (after / before).sqrt() + tails * (p / (after * before).sqrt())
        self.size -= 1  # the old last row stays below, where `_solve` puts zeros, until the next one overwrites it

    def solve(self, right: Tensor) -> Tensor:
        """Solve with the matrix.

        Args:
            right: ``[size]``.

        Returns:
            ``[size]``.
        """
        return self._solve(self._solve(right, transposed=False), transposed=True)

    def _solve(self, right: Tensor, *, transposed: bool) -> Tensor:
        # The whole buffer with zeros beyond `size`: a view of a part of it would be copied for every solve.
        padded = right.new_zeros(len(self._factor), 1)
        padded[: self.size, 0] = right
        factor = self._factor.mT if transposed else self._factor
        solved: Tensor = torch.linalg.solve_triangular(factor, padded, upper=transposed)
        return solved[: self.size, 0]


class _Pursuit:
    """One pursuit under way.

    The columns are ``vec(e_i x_i^T)``. A product of all of them with a matrix costs two thin products, and no column
    is ever formed.
    """

    def __init__(self, inputs: Tensor, errors: Tensor, limit: int, ridge: float) -> None:
        self.exponent = rescale_(inputs) + rescale_(errors)
        self.inputs, self.errors = (m.to(exact_dtype(m)) for m in (inputs, errors))
        squares = self.inputs.double().square().sum(1) * self.errors.double().square().sum(1)
        self.ridge = ridge * float(squares.mean())
        self.largest = math.sqrt(float(squares.max()))
        self.target = errors.new_zeros(errors.shape[1], inputs.shape[1], dtype=torch.float64)
        for x, e in zip(self.inputs.split(CHUNK), self.errors.split(CHUNK), strict=True):
            self.target.addmm_(e.double().T, x.double(), alpha=1 / len(inputs))
        self.closed = self.inputs.new_zeros(len(inputs))  # -inf for what cannot be chosen now
        self.factor = GrowingCholesky(limit)
        self.chosen: list[int] = []
        self.weights = self.target.new_zeros(0)
        self.aims = self.target.new_zeros(0)  # inner products of the chosen columns with the target
        self.x = self.target.new_zeros(limit, inputs.shape[1])
        self.e = self.target.new_zeros(limit, errors.shape[1])
        self.dropped = 0

    def products(self, matrix: Tensor) -> Tensor:
        """Inner products of all columns with a matrix."""
        return (self.inputs @ matrix.T.to(self.inputs.dtype)).mul_(self.errors).sum(1)

    def residual(self) -> Tensor:
        """What is left of the target."""
        size = len(self.chosen)
        return torch.addmm(self.target, (self.e[:size] * self.weights.unsqueeze(1)).T, self.x[:size], alpha=-1)

    def add(self, column: int) -> bool:
        """Take a column with weight 0, unless it depends on those taken."""
        size = len(self.chosen)
        x, e = self.inputs[column].double(), self.errors[column].double()
        products = (self.x[:size] @ x) * (self.e[:size] @ e)
        self.closed[column] = -math.inf
        if not self.factor.append(products, float(x @ x) * float(e @ e) + self.ridge):
            return False
        self.x[size], self.e[size] = x, e
        self.chosen.append(column)
        self.weights = torch.cat([self.weights, self.weights.new_zeros(1)])
        self.aims = torch.cat([self.aims, (self.target @ x @ e).unsqueeze(0)])
        return True

    def refit(self) -> None:
        """Make the weights the best that are not negative (the inner loop of Lawson and Hanson's algorithm)."""
        newest = self.chosen[-1]
        while self.chosen:
            goal = self.factor.solve(self.aims)
            low = goal <= 0
            if not bool(low.any()):
                self.weights = goal
                return
            # As far towards the goal as no weight goes below zero: the loss falls at every step, so none repeats.
            steps = torch.where(low, self.weights / (self.weights - goal), 1.0).nan_to_num(0.0)
            first = int(steps.argmin())
            self.weights += steps[first] * (goal - self.weights)
            gone = low & (self.weights <= 1e-12 * self.weights.max())
            gone[first] = True
            for at in reversed(gone.nonzero().squeeze(1).tolist()):
                self._drop(at, again=self.chosen[at] != newest)

    def _drop(self, at: int, *, again: bool) -> None:
        size = len(self.chosen)
        self.factor.remove(at)
        column = self.chosen.pop(at)
        self.dropped += 1
        if again:  # what leaves in the step in which it came would come at once again
            self.closed[column] = 0
        keep = torch.arange(size, device="cpu") != at
        self.weights, self.aims = self.weights[keep], self.aims[keep]
        for rows in (self.x, self.e):
            rows[at : size - 1] = rows[at + 1 : size].clone()


def pursue(
    inputs: Tensor,
    errors: Tensor,
    count: int,
    *,
    ridge: float = 0.5,
    tolerance: float = 1e-4,
    told: Callable[[int], None] = unheard,
) -> Matched:
    r"""Match the mean of columns :math:`g_i = \mathrm{vec}(e_i x_i^T)` by a few of them with weights.

    Each step takes the column with the largest inner product with the residual
    :math:`\bar g - \sum_j w_j g_j`, then solves anew for all weights,

    .. math:: \min_{w \geq 0} \Big\| \bar g - \sum_j w_j g_j \Big\|^2 + \lambda \| w \|^2, \qquad
        \lambda = \mathrm{ridge} \cdot \tfrac1n \sum_i \| g_i \|^2,

    by one row more in a Cholesky factor; a column whose weight would be negative is dropped, as in Lawson and Hanson's
    active sets. It ends early where the residual is small, or where no column left points along it.

    Args:
        inputs: Rows x, ``[n, d_in]``; overwritten.
        errors: Rows e, ``[n, d_out]``; overwritten.
        count: Most columns to take.
        ridge: Factor of the penalty, relative to the columns' mean square.
        tolerance: Residual, relative to the target, at which the match is good enough.
        told: Called with how many are taken.

    Returns:
        The match; empty where the mean is zero.
    """
    state = _Pursuit(inputs, errors, count, ridge)
    whole = float(state.target.norm())
    rounding = torch.finfo(torch.float32).eps * state.largest
    if whole <= rounding:
        whole = 0.0
    left = whole
    projections = state.products(state.target / (whole or math.inf)).float()
    for _ in range(4 * count + 64):  # every drop is undone by a step, and rounding must not make that go on for ever
        if len(state.chosen) == count or left <= tolerance * whole:
            break
        along = state.products(state.residual()).add_(state.closed)
        best = int(along.argmax())
        if float(along[best]) <= rounding * left:
            break
        if state.add(best):
            state.refit()
            left = float(state.residual().norm())
        told(len(state.chosen))
    chosen = torch.tensor(state.chosen, dtype=torch.int64, device="cpu")
    scale = 2.0**state.exponent  # of the columns; weights and relative residuals do not depend on it
    return Matched(chosen, state.weights, left / whole if whole else 0.0, projections * scale, state.dropped)
