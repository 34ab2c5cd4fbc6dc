"""Kalman filter: conditions that remember, by a covariance of the parameters, what earlier batches have settled."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.distributed.jacobian import SpreadJacobian
from steepest.engine import Jacobian
from steepest.errors import InvalidOptionError
from steepest.linalg import symmetric_spectrum
from steepest.optim.gram import Solution, check_products, unflatten
from steepest.optim.leave_one_out import left_out
from steepest.optim.solvers import Trial

__all__ = ["KalmanFilter"]

_CHUNK = 128  # rows at a time: one after another they give what all at once would
_FLOOR = 1e-12  # of the noise against what the covariance says of the rows: below, sums are rounding
_RAISE, _LOWER = 10.0, 2.0  # factors of the noise: after a step that did not help, and after one that did at once
_MOST = 1e30  # of these factors
_DECADES = 2.5  # to either side of the rows' mean square, where the noise is looked for
_PER_DECADE = 2
_OUTPUTS = 8  # of a sample, where there are more than a chunk of rows
_LATELY = 100  # batches over which what they find is averaged
_AGAIN, _SAME = 0.1, 1e-5  # noise of a batch that comes again, and how closely its sum of squares tells that it does
_OWN = 5  # numbers of the memory before C


@dataclass(frozen=True)
class KalmanFilter:
    r"""The conditions of all batches so far, solved batch by batch: an extended Kalman filter.

    .. math:: d = C J^T (J C J^T + \sigma^2 I)^{-1} R, \qquad C \leftarrow C - C J^T (J C J^T + \sigma^2 I)^{-1} J C

    C is the covariance of the parameters: how far, and in which directions, they may still move without spoiling what
    earlier batches asked for. Were the rows linear, the parameters after n batches would be the regularised least
    squares solution of all of them, which no step that forgets the batches before it can reach: directions in which
    single batches say little are settled by many. It has P^2 numbers in float64, beside the R P of J, and a step of R
    rows takes ``4 R P^2`` operations, so this is for models of up to some thousands of parameters.

    The batches themselves say what of their rows is noise to each other. With ``K = J C J^T`` the conditions of all
    other samples would leave :math:`[(K + \sigma^2 I)^{-1} R]_n / [(K + \sigma^2 I)^{-1}]_{nn}` of a row, and the
    noise ``sigma^2 = q mean(R^2)`` that leaves least is looked for at q from 1/300 to 300. Single batches differ much,
    so what counts is the geometric mean of what the last 100 or so have found. Rows of several outputs of one sample
    are left out together. Of more than 128 rows some are looked at, evenly. A batch whose sum of squares is what the
    step before has left (to 1e-5) is the same once more: there are no others to be kept from, and q is at most 1/10.

    Rows that are not linear are the reason for the rest. Before each step

    .. math:: C \leftarrow (1 - \rho)\, C + \rho\, \pi I, \qquad
        \rho = \min\Big(1, \frac{\mathrm{drift}}{\max(1, q)}\,\frac{R}{P}\,\sqrt{\frac{s}{\pi}}\Big), \qquad
        s = \frac{\operatorname{mean}_n R_n^2}{\operatorname{mean}_n |J_n|^2}

    with pi the largest s so far and ``C = s I`` at first, so that nothing depends on the units of rows or parameters:
    what was learnt fades as long as there is much left to learn, and the more slowly the less a batch says. After a
    step the closure is called again, without a backward. If the sum of squares of the rows did not fall, before any
    weight decay, the parameters go back and the same conditions are solved with ten times the noise. The next step
    begins with the noise that this one ended with, and where no step had to be taken back it becomes half of that, down
    to the usual one. Of a step that the learning rate shortens to a share eta C learns as much as such a step settles,
    ``1 - (1 - eta)^2``.

    Where the samples of a batch say little of each other, as with many inputs and few samples, it begins cautiously:
    `LeaveOneOut` in a `KroneckerMetric` is ahead at first.

    Several processes: every one gathers J, ``M P s`` bytes for the M rows of the rank that has most and parameters of s
    bytes; what rank 0 finds of the noise is broadcast, 8 bytes, and every try broadcasts ``8 P + 8`` and sums 16.

    Args:
        noise: "auto", or q, the variance of the rows' noise in multiples of their mean square; the smaller, the
            faster, and the more single batches decide.
        drift: How fast what was learnt fades at first: this much for every P rows. 0 is right for rows that are linear.
        max_trials: Steps that are tried before a step leaves the parameters as they were.
        max_parameters: Models with more parameters are refused.

    Raises:
        InvalidOptionError: If an option is impossible; on construction of the optimizer if the model is too large.

    References:
        Singhal and Wu, Training multilayer perceptrons with the extended Kalman algorithm, NIPS 1988; as natural
        gradient: Ollivier, arXiv 1703.00209. The closed form of what is left of a row is Allen's PRESS (Technometrics
        16, 1974, pages 125 to 127). The conditions are those of Sven, arXiv 2604.01279.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> opt = st.Sven(model, rows="residuals", solver=st.KalmanFilter())
        >>> for _ in range(200):
        ...     x = 2 * torch.rand(16, 1) - 1
        ...     loss = opt.step(lambda: (model(x) - torch.sin(3 * x)).squeeze(1))
        >>> bool(loss < 1e-6)
        True
    """

    noise: float | Literal["auto"] = "auto"
    drift: float = 0.7
    max_trials: int = 5
    max_parameters: int = 4096

    def __post_init__(self) -> None:
        if isinstance(self.noise, str) and self.noise != "auto":
            raise InvalidOptionError(f"noise={self.noise!r}: choose 'auto' or a number above 0.")
        if self.noise != "auto":
            check_real("noise", self.noise, low=0, open_low=True)
        check_real("drift", self.drift, low=0)
        check_integer("max_trials", self.max_trials, low=1)
        check_integer("max_parameters", self.max_parameters, low=1)

    def check_size(self, count: int) -> None:
        """Refuse a model that is too large.

        Args:
            count: Number of its parameters.

        Raises:
            InvalidOptionError: If there are more than ``max_parameters``.
        """
        if count > self.max_parameters:
            raise InvalidOptionError(
                f"KalmanFilter on {count:,} parameters: their covariance would have {count**2 * 8 / 2**30:.1f} GiB. "
                f"Raise max_parameters={self.max_parameters} if it fits, train some of them only (params=), or use "
                "steepest.LeaveOneOut()."
            )

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve by what this batch alone says.

        Args:
            jacobian: J, R rows of one sample each.
            rhs: ``[R]``.

        Returns:
            The direction, untried.
        """
        belief = _Belief(self, jacobian, rhs, None)
        flat = belief.solved(belief.noise([(jacobian.num_rows, 1)], None))
        return belief.solution(rhs.new_zeros(jacobian.num_parameters).double() if flat is None else flat)

    def search(self, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None, trial: Trial) -> tuple[Solution, bool]:
        """Try steps with more and more noise until one lowers the sum of squares.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.
            memory: ``memory`` of the solution before, None at the first: pi, the factor of the noise, how many batches
                have looked for q, the mean of its logarithm, the sum of squares that was left, C.
            trial: How to try a step.

        Returns:
            The last direction that was tried, with the new memory, and whether it was accepted.
        """
        belief = _Belief(self, jacobian, rhs, memory)
        usual, left = belief.noise(trial.samples, trial.before), trial.before
        nothing = torch.zeros(jacobian.num_parameters, dtype=torch.float64, device=jacobian.device)
        solution, accepted, used = belief.solution(nothing), False, 0.0
        factor, next_ = belief.factor, max(1.0, belief.factor / _LOWER)
        for _ in range(self.max_trials if usual > 0 else 0):
            used = factor * usual
            flat = belief.solved(used)
            if flat is not None:
                solution = belief.solution(flat)
                left = min(left, trial(solution, 1.0))
                accepted = left < trial.before
            if accepted:
                belief.learn(trial.rates)
                break
            factor *= _RAISE
            next_ = factor
        # Where no noise is enough nothing helps; whoever changes the conditions finds the usual one.
        belief.factor = next_ if next_ < _MOST else 1.0
        return replace(solution, damping=used, memory=belief.memory(left)), accepted


class _Belief:
    """What is known of the parameters before a batch and with it.

    Args:
        solver: The settings.
        jacobian: J, of all processes.
        rhs: ``[R]``.
        memory: What the step before left; where that had other parameters, nothing is known of these.

    Attributes:
        factor: Of the noise.
    """

    def __init__(self, solver: KalmanFilter, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None) -> None:
        count = jacobian.num_parameters
        solver.check_size(count)
        self._jacobian, self._rows, self._target = jacobian, jacobian.to_dense(torch.float64), rhs.double()
        mean, size = self._target.square().mean(), self._rows.square().sum() / len(rhs)
        check_products(mean + size)
        # Conditions that no parameter moves say nothing of the parameters.
        scale = torch.where(size > 0, mean / size, 0)
        self._given, self._mean = None if solver.noise == "auto" else float(solver.noise), float(mean)
        self.factor, self._batches, self._found, self._left = 1.0, 0.0, 0.0, 0.0
        if memory is None or len(memory) != _OWN + count**2 or memory[0] == 0:
            self._prior, faded, self._before = scale, 1.0, self._rows.new_zeros(count, count)
        else:
            before, self.factor, self._batches, self._found, self._left = memory[:_OWN].tolist()
            self._prior = scale.clamp(min=before)
            drift = solver.drift / max(1.0, self._multiple)
            faded = min(1.0, drift * len(rhs) / count * float((scale / self._prior).sqrt()))
            self._before = memory[_OWN:].to(scale).view(count, count)
        # C is the former one times the first and the identity times the second, and need not be formed.
        self._kept, self._added = 1 - faded, faded * float(self._prior)
        self._after: Tensor | None = None
        self._learnt = False
        self._reach = self._reached(self._rows[:_CHUNK])
        self._matrix = self._rows[:_CHUNK] @ self._reach

    @property
    def _multiple(self) -> float:
        """The noise in multiples of the mean square."""
        return 10**self._found if self._given is None else self._given

    def noise(self, samples: Sequence[tuple[int, int]], total: float | None) -> float:
        """The noise before any factor.

        Args:
            samples: Number of samples and rows of each, block by block.
            total: Sum of the squared rows.

        Returns:
            sigma^2.
        """
        if self._given is None:
            if total is not None and abs(total - self._left) <= _SAME * total:
                return min(self._multiple, _AGAIN) * self._mean
            self._look(samples)
        return self._multiple * self._mean

    def _reached(self, rows: Tensor) -> Tensor:
        """C times rows, as columns."""
        return (self._before @ rows.T).mul_(self._kept).add_(rows.T, alpha=self._added)

    def _look(self, samples: Sequence[tuple[int, int]]) -> None:
        """See which noise leaves least of the rows of samples that are left out."""
        if self._mean == 0 or sum(count for count, _ in samples) == 1:  # of one sample the others say nothing
            return
        target, matrix = self._target, self._matrix
        if len(target) > _CHUNK:
            picked, samples = _fewer(samples)
            rows, target = self._rows[picked], target[picked]
            matrix = rows @ self._reached(rows)
        spectrum = symmetric_spectrum(matrix)
        tens = torch.linspace(-_DECADES, _DECADES, int(2 * _DECADES * _PER_DECADE) + 1).to(target)
        noises = (10**tens * self._mean).clamp(min=_FLOOR * float(matrix.diagonal().mean()))
        left = left_out(spectrum.values.square(), spectrum.vectors, target, noises, samples).square().sum(1)
        best = tens[(left <= left.min()).nonzero()[-1]]
        if isinstance(self._jacobian, SpreadJacobian):
            self._jacobian.ranks.broadcast_([best], source=0)
        self._batches += 1
        self._found += (float(best) - self._found) / min(self._batches, _LATELY)

    def solved(self, noise: float) -> Tensor | None:
        """Solve with a noise.

        Args:
            noise: sigma^2.

        Returns:
            d, flat; None where rounding has made the conditions indefinite.
        """
        flat, learnt, failed = torch.zeros_like(self._rows[0]), None, False
        for rows, target in zip(self._rows.split(_CHUNK), self._target.split(_CHUNK), strict=True):
            reach = self._reach if learnt is None else learnt @ rows.T
            matrix = self._matrix.clone() if learnt is None else rows @ reach
            matrix.diagonal().add_(matrix.diagonal().mean().mul(_FLOOR).clamp(min=noise))
            factor, info = torch.linalg.cholesky_ex(matrix)
            if failed := bool(info):
                break
            half = torch.linalg.solve_triangular(factor, reach.T, upper=False)
            left = torch.linalg.solve_triangular(factor, (target - rows @ flat).unsqueeze(1), upper=False)
            flat += (half.T @ left).squeeze(1)
            if learnt is None:
                learnt = torch.addmm(self._before, half.T, half, beta=self._kept, alpha=-1)
                learnt.diagonal().add_(self._added)
            else:
                learnt.addmm_(half.T, half, alpha=-1)
        self._after = learnt
        return self._agreed(flat, failed)

    def learn(self, rates: dict[str, float]) -> None:
        """Keep what the last direction settles.

        Args:
            rates: Share of the direction that was taken, of every parameter.
        """
        shapes = self._jacobian.shapes
        left = torch.cat([self._target.new_full((shape.numel(),), 1 - rates[name]) for name, shape in shapes.items()])
        if self._after is not None and bool(left.any()):
            self._after += left.unsqueeze(1) * (self._covariance() - self._after) * left
        self._learnt = True

    def memory(self, left: float) -> Tensor:
        """What the next step has to be given.

        Args:
            left: Sum of the squared rows after this one.

        Returns:
            ``[5 + P P]``.
        """
        covariance = self._after if self._learnt and self._after is not None else self._covariance()
        own = self._prior.new_tensor([self._prior, self.factor, self._batches, self._found, left])
        return torch.cat([own, covariance.flatten()])

    def _covariance(self) -> Tensor:
        """C as it was before this batch's conditions."""
        covariance = self._kept * self._before
        covariance.diagonal().add_(self._added)
        return covariance

    def solution(self, flat: Tensor) -> Solution:
        """Wrap a direction."""
        norm = float(torch.linalg.vector_norm(flat))
        explicit = unflatten(flat, self._jacobian)
        rank = min(len(self._rows), len(flat))
        floor = 32 * torch.finfo(self._jacobian.dtype).eps
        return Solution(self._jacobian, rank, None, floor, norm, norm, explicit=explicit)

    def _agreed(self, flat: Tensor, failed: bool) -> Tensor | None:
        """What rank 0 found, where rounding could make others find something else."""
        if isinstance(self._jacobian, SpreadJacobian):
            told = flat.new_tensor([float(failed)])
            self._jacobian.ranks.broadcast_([flat, told], source=0)
            failed = bool(told.item())
        return None if failed else flat


def _fewer(samples: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Some of many rows, evenly over samples and outputs: their places, and samples and rows of each, by block."""
    every = -(-sum(count * min(size, _OUTPUTS) for count, size in samples) // _CHUNK)
    places, shapes, row, sample = [], [], 0, 0
    for count, size in samples:
        # Counted over all blocks: rows that lie on several processes give the same samples as on one.
        chosen, outputs = range(-sample % every, count, every), min(size, _OUTPUTS)
        places += [row + n * size + k * size // outputs for n in chosen for k in range(outputs)]
        shapes += [(len(chosen), outputs)] if chosen else []
        row, sample = row + count * size, sample + count
    return places, shapes
