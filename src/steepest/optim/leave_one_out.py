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
_SMALLEST_LENGTH = 1e-3  # before caution
_SHORTEST = 1 / 32  # share of a direction, below which another one is better
_HALVINGS = 4
_ROUNDING = torch.finfo(torch.float64).eps
_TINY = torch.finfo(torch.float64).tiny
_LIMITS = 3  # numbers that end the memory: the longest step and the smallest damping to be trusted, the damping used
_RAISE, _LOWER = 10.0, 2.0  # factors of the smallest damping that is trusted, after a halving and without one
_WIDEN = 2.0  # factor of the longest step that is trusted, after one that was taken


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

    Rows of several outputs of one sample are left out together. With more rows R than parameters P the same numbers
    come from :math:`J^T J` and J itself, R P numbers in float64, and dampings below the rounding of that sum are left
    out.

    All of that is linear, and the model is not. So the closure is called once more after the step, without a backward:
    where the sum of the batch's squares has not fallen, before any weight decay, the step is halved, up to 4 times, and
    then given up, and the next steps take a larger damping, ten times for every halving. Where none was needed smaller
    ones are allowed again, by factors of two. After a step that was given up the next one is no longer than half the
    last length that was tried, by a larger damping rather than a shorter step, and every step that is taken allows
    twice the length. A first step of which the norm guard would leave less than 1/32 is not tried: the next one has a
    larger damping. The second call must give the same batch; random numbers such as dropout's are repeated for it.

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
        gram = Gram(jacobian, rhs, "auto", self.precision)
        spectrum = symmetric_spectrum(gram.matrix)
        singular, vectors, target = spectrum.values.double(), spectrum.vectors.double(), rhs.double()
        values = singular.square()
        relative = self._grid(several=any(size > 1 for _, size in samples)).to(values.device)
        mean = values.sum() / jacobian.num_rows
        # Conditions that no parameter moves have no scale: any will do.
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        grid = relative * mean
        features = (jacobian.to_dense(gram.matrix.dtype) @ spectrum.vectors).double() if gram.primal else vectors
        seen = _worth(target, left_out(values, features, target, grid, samples, primal=gram.primal))
        floor, radius = self.smallest, math.inf
        # Rows of another kind, or other options, have another grid: running means over it say nothing of this one.
        if memory is not None and len(memory) == seen.numel() + _LIMITS:
            seen = self.decay * memory[:-_LIMITS].to(seen).view_as(seen) + (1 - self.decay) * seen
            radius, floor = memory[-_LIMITS:-1].tolist()
        lengths = (seen[0] / seen[1].clamp(min=_TINY)).clamp(0, 1)
        decrease = lengths * (2 * seen[0] - lengths * seen[1])
        known = decrease > _ROUNDING
        lengths = torch.where(known, lengths, 0).clamp(min=_SMALLEST_LENGTH) ** self.caution
        # A sum over the rows has lost what is smaller than its rounding.
        rounding = float(torch.finfo(gram.matrix.dtype).eps * values[0] / mean) if gram.primal else 0.0
        projected, inverse = vectors.T @ gram.rhs.double(), 1 / (values + grid.unsqueeze(1))
        norms = torch.linalg.vector_norm(inverse * projected * (1.0 if gram.primal else singular), dim=1)
        usable = known & (relative >= max(floor, rounding)) & (lengths * norms <= radius)
        best = self._chosen(decrease, usable)
        solution = gram.solution((vectors @ (inverse[best] * projected)).to(gram.matrix.dtype), len(values), singular)
        learnt = torch.cat([seen.flatten(), seen.new_tensor([radius, floor, float(relative[best])])])
        length = min(float(lengths[best]), max(radius / float(norms[best].clamp(min=_TINY)), _SHORTEST))
        return replace(solution, step=length, damping=float(grid[best]), memory=learnt)

    def _chosen(self, decrease: Tensor, usable: Tensor) -> int:
        """The largest usable damping that is nearly as good as the best; the largest of all where none is usable."""
        if not bool(usable.any()):
            return len(decrease) - 1
        most = float(decrease[usable].max())
        enough = most - self.slack * min(most, max(1 - most, 0.0))
        return int((usable & (decrease >= enough)).nonzero()[-1])

    def _grid(self, *, several: bool) -> Tensor:
        """Relative dampings; where samples have several rows, these may depend on each other to rounding."""
        low, high = math.log10(max(self.smallest, _SMALLEST_SEVERAL if several else 0.0)), math.log10(self.largest)
        return torch.logspace(low, high, max(1, int((high - low) * _PER_DECADE) + 1), dtype=torch.float64)


def _worth(rhs: Tensor, left: Tensor) -> Tensor:
    """``<p, R> / |R|^2`` and ``<p, p> / |R|^2`` for every damping, ``[2, grid]``."""
    predicted = rhs - left
    total = rhs @ rhs
    total = torch.where(total > 0, total, torch.ones_like(total))
    return torch.stack([predicted @ rhs, predicted.square().sum(1)]) / total


def left_out(
    values: Tensor,
    features: Tensor,
    rhs: Tensor,
    dampings: Tensor,
    samples: Sequence[tuple[int, int]],
    *,
    primal: bool = False,
) -> Tensor:
    """What is left of every sample's conditions by a damped solution of all the other samples' conditions.

    Of ``lambda (J J^T + lambda)^-1``, which is 1 less what the rows predict of themselves, it needs the blocks on the
    diagonal: from the eigenvectors of ``J J^T``, or of ``J^T J`` where that is smaller.

    Args:
        values: ``[n]``, eigenvalues of the Gram.
        features: ``[R, n]``, the eigenvectors of ``J J^T`` as columns, or J times those of ``J^T J``.
        rhs: ``[R]``.
        dampings: ``[L]``.
        samples: Number of samples and rows of each, block by block.
        primal: Whether ``J^T J`` is the Gram.

    Returns:
        ``[L, R]``.
    """
    # (J J^T + lambda)^-1 is U w U^T; times lambda, 1 - F w F^T.
    share = 1 / (values + dampings.unsqueeze(1))
    own, share = (1.0, -share) if primal else (0.0, share)
    solved = own * rhs + (share * (features.T @ rhs)) @ features.T
    parts, start = [], 0
    for count, size in samples:
        rows = slice(start, start + count * size)
        start = rows.stop
        if size == 1:
            diagonal = own + share @ features[rows].square().T
            parts.append(solved[:, rows] / diagonal.clamp(min=own * torch.finfo(diagonal.dtype).eps))
            continue
        block = features[rows].view(count, size, -1)
        unit = own * torch.eye(size, dtype=rhs.dtype, device=rhs.device)
        blocks = torch.stack([unit + (block * weights) @ block.mT for weights in share])
        parts.append(torch.linalg.solve(blocks, solved[:, rows].view(-1, count, size, 1)).flatten(1))
    return torch.cat(parts, 1)


def verified(
    solution: Solution, before: float, attempt: Callable[[Solution, float], float], scale: float = 1.0
) -> tuple[Solution, bool]:
    """Shorten a step until the batch it was made for gains by it.

    Args:
        solution: The direction, with its length and the solver's memory.
        before: Sum of the squared rows.
        attempt: Moves the parameters along a share of a direction and returns the sum of squares there; if that is not
            below ``before``, it moves them back.
        scale: Factor of the norm guard, of every share.

    Returns:
        The direction with the length that was taken and the new memory, and whether the parameters moved.
    """
    memory, length = solution.memory, solution.step
    # What cannot gain says nothing of damping and length.
    worth = length * solution.norm > 0 and before > 0 and scale > _SHORTEST
    halvings, accepted = 0, worth and attempt(solution, length * scale) < before
    while worth and not accepted and halvings < _HALVINGS:
        halvings, length = halvings + 1, length / 2
        accepted = attempt(solution, length * scale) < before
    if memory is not None:
        radius, floor, used = memory[-_LIMITS:].tolist()
        taken = length * scale * solution.norm
        floor = max(floor, used * _RAISE**halvings) if halvings else floor / _LOWER
        if accepted or not worth:
            radius = _WIDEN * (min(radius, taken) if scale < 1 else max(radius, taken))
        else:  # what so short a step gains is lost in rounding: shorter ones would never end
            radius = taken / 2 if solution.step > _SHORTEST else math.inf
        memory = torch.cat([memory[:-_LIMITS], memory.new_tensor([radius, floor, used])])
    return replace(solution, step=length if accepted else 0.0, memory=memory), accepted
