"""Damping and length of a step by leave-one-out cross-validation on the batch itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest._typing import Precision
from steepest._validation import check_choice, check_real
from steepest.engine import Jacobian
from steepest.linalg import symmetric_spectrum
from steepest.optim.gram import Gram, Solution

__all__ = ["LeaveOneOut", "left_out", "verified"]

_PER_DECADE = 2
_SMALLEST_SEVERAL = 1e-8
_HALVINGS = 4
_RAISE, _LOWER = 10.0, 2.0  # factors of the smallest damping that is trusted, after a halving and without one


@dataclass(frozen=True)
class LeaveOneOut:
    r"""Damped conditions whose damping and step length the batch itself decides, without a rate to tune.

    A damped solution of all conditions but those of sample n predicts the change of sample n's own; how well it does is
    what the step is worth for data that it has not seen. With the Gram :math:`K = J J^T` nothing has to be solved
    again for that:

    .. math:: e_n = \big[(K + \lambda I)^{-1}\big]_{nn}^{-1} \big[(K + \lambda I)^{-1} R\big]_n, \qquad p_n = R_n - e_n

    is the residual that is left at sample n, and what the others predict of it, for every damping on a grid of relative
    sizes :math:`\lambda / \operatorname{mean}(K)` from one eigendecomposition. Running means over the batches of
    :math:`\langle p, R \rangle / |R|^2` and :math:`\langle p, p \rangle / |R|^2` give the damping with nearly the
    largest expected decrease (see ``slack``) and the best length
    :math:`\eta = \langle p, R \rangle / \langle p, p \rangle` of its step. The step is :math:`\eta^c d`, c the
    ``caution``: with 1 the loss of the next step is all that counts, and noise shortens steps more than is good for the
    steps after it.

    Rows of several outputs of one sample are left out together.

    All of that is linear, and the model is not. So the closure is called once more after the step, without a backward:
    where the sum of the batch's squares has not fallen, the step is halved, up to 4 times, and then given up, and the
    next steps take a larger damping, ten times for every halving. Where none was needed smaller ones are allowed again,
    by factors of two. The second call must give the same batch; random numbers such as dropout's are repeated for it.

    Args:
        decay: Share of the past in the running means.
        caution: c, from 0 (the whole damped solution) to 1.
        smallest: Smallest relative damping on the grid; of samples with several rows at least 1e-8.
        largest: Largest relative damping on the grid. Where the batches are noise the next step's loss would ask for
            ever larger ones, which only shorten the steps that later batches would have gained by.
        slack: Share of the largest expected decrease that is given away for a larger damping, and at most the same
            share of what that decrease would leave: where data are noisy the decrease hardly depends on the damping,
            and the larger one leaves more to the batches that follow; where they are not, all that counts is what is
            left.
        verify: Whether steps are tried out. False saves the second forward pass, and trusts the linear model.
        precision: Precision of the Gram's products. With "float32" rounding keeps the damping above about 1e-7.

    Raises:
        InvalidOptionError: If an option is impossible.

    References:
        The closed form is Allen's PRESS (Technometrics 16, 1974, pages 125 to 127), here for the conditions of Sven,
        arXiv 2604.01279.

    Example:
        >>> import steepest as st
        >>> st.LeaveOneOut(caution=1.0).decay
        0.97
    """

    decay: float = 0.97
    caution: float = 0.25
    smallest: float = 1e-14
    largest: float = 0.3
    slack: float = 0.3
    verify: bool = True
    precision: Precision = "float64"

    def __post_init__(self) -> None:
        check_real("decay", self.decay, low=0, high=1, open_high=True)
        check_real("caution", self.caution, low=0, high=1)
        check_real("smallest", self.smallest, low=0, open_low=True)
        check_real("largest", self.largest, low=self.smallest)
        check_real("slack", self.slack, low=0, high=1, open_high=True)
        check_choice("precision", self.precision, ("float64", "float32"))

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve by what this batch alone says.

        Args:
            jacobian: J, R rows of one sample each.
            rhs: ``[R]``.

        Returns:
            The direction with its length in ``step``.
        """
        return self.adapt(jacobian, rhs, None, [(jacobian.num_rows, 1)])

    def adapt(
        self, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None, samples: Sequence[tuple[int, int]]
    ) -> Solution:
        """Solve by what this batch and those before it say.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.
            memory: ``memory`` of the solution before, None at the first.
            samples: Number of samples and rows of each, block by block.

        Returns:
            The direction with its length in ``step`` and the new ``memory``.
        """
        gram = Gram(jacobian, rhs, "dual", self.precision)
        spectrum = symmetric_spectrum(gram.matrix)
        values, vectors = spectrum.values.double().square(), spectrum.vectors.double()
        target = rhs.double()
        relative = self._grid(several=any(size > 1 for _, size in samples)).to(values.device)
        mean = values.mean()
        # Conditions that no parameter moves have no scale: any will do.
        grid = relative * torch.where(mean > 0, mean, torch.ones_like(mean))
        seen = _worth(values, vectors, target, grid, samples)
        floor = self.smallest
        # Rows of another kind, or other options, have another grid: running means over it say nothing of this one.
        if memory is not None and len(memory) == seen.numel() + 2:
            seen = self.decay * memory[:-2].to(seen).view_as(seen) + (1 - self.decay) * seen
            floor = float(memory[-2])
        lengths = (seen[0] / seen[1].clamp(min=torch.finfo(torch.float64).tiny)).clamp(0, 1)
        decrease = lengths * (2 * seen[0] - lengths * seen[1])
        decrease = torch.where(relative >= min(floor, float(relative[-1])), decrease, -1)
        most = float(decrease.max())
        # The largest damping that is nearly as good as the best.
        enough = most - self.slack * min(most, max(1 - most, 0.0))
        best = int((decrease >= enough).nonzero()[-1]) if most > 0 else int(decrease.argmax())
        length = float(lengths[best])
        solved = vectors @ ((vectors.T @ target) / (values + grid[best]))
        solution = gram.solution(solved.to(gram.matrix.dtype), len(solved), spectrum.values.double())
        learnt = torch.cat([seen.flatten(), seen.new_tensor([floor, float(relative[best])])])
        return replace(solution, step=length**self.caution, damping=float(grid[best]), memory=learnt)

    def _grid(self, *, several: bool) -> Tensor:
        """Relative dampings; where samples have several rows, these may depend on each other to rounding."""
        low, high = math.log10(max(self.smallest, _SMALLEST_SEVERAL if several else 0.0)), math.log10(self.largest)
        return torch.logspace(low, high, max(1, int((high - low) * _PER_DECADE) + 1), dtype=torch.float64)


def _worth(values: Tensor, vectors: Tensor, rhs: Tensor, grid: Tensor, samples: Sequence[tuple[int, int]]) -> Tensor:
    """``<p, R> / |R|^2`` and ``<p, p> / |R|^2`` for every damping, ``[2, grid]``."""
    predicted = rhs - left_out(values, vectors, rhs, grid, samples)
    total = rhs @ rhs
    total = torch.where(total > 0, total, torch.ones_like(total))
    return torch.stack([predicted @ rhs, predicted.square().sum(1)]) / total


def left_out(
    values: Tensor, vectors: Tensor, rhs: Tensor, dampings: Tensor, samples: Sequence[tuple[int, int]]
) -> Tensor:
    """What is left of every sample's conditions by a damped solution of all the other samples' conditions.

    Args:
        values: ``[R]``, eigenvalues of the Gram.
        vectors: ``[R, R]``, its eigenvectors as columns.
        rhs: ``[R]``.
        dampings: ``[L]``.
        samples: Number of samples and rows of each, block by block.

    Returns:
        ``[L, R]``.
    """
    inverse = 1 / (values + dampings.unsqueeze(1))
    solved = (inverse * (vectors.T @ rhs)) @ vectors.T
    parts, start = [], 0
    for count, size in samples:
        rows = slice(start, start + count * size)
        start = rows.stop
        if size == 1:
            parts.append(solved[:, rows] / (inverse @ vectors[rows].square().T))
            continue
        own = vectors[rows].view(count, size, -1)
        blocks = torch.stack([(own * row) @ own.mT for row in inverse])  # diagonal blocks of the inverse
        parts.append(torch.linalg.solve(blocks, solved[:, rows].view(-1, count, size, 1)).flatten(1))
    return torch.cat(parts, 1)


def verified(solution: Solution, before: float, attempt: Callable[[Solution, float], float]) -> tuple[Solution, bool]:
    """Shorten a step until the batch it was made for gains by it.

    Args:
        solution: The direction, with its length and the solver's memory.
        before: Sum of the squared rows.
        attempt: Moves the parameters along a share of a direction and returns the sum of squares there; if that is not
            below ``before``, it moves them back.

    Returns:
        The direction with the length that was taken and the new memory, and whether the parameters moved.
    """
    memory, length = solution.memory, solution.step
    worth = length > 0 and before > 0  # conditions that hold already say nothing of the damping
    halvings, accepted = 0, worth and attempt(solution, length) < before
    while worth and not accepted and halvings < _HALVINGS:
        halvings, length = halvings + 1, length / 2
        accepted = attempt(solution, length) < before
    if memory is not None:
        floor, used = memory[-2:].tolist()
        floor = max(floor, used * _RAISE**halvings) if halvings else floor / _LOWER
        memory = torch.cat([memory[:-2], memory.new_tensor([floor, used])])
    return replace(solution, step=length if accepted else 0.0, memory=memory), accepted
