"""Levenberg-Marquardt: steps that are tried out, and a damping that follows from how they went."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.distributed.jacobian import own_rows
from steepest.engine import Jacobian
from steepest.optim.damped import DampedSystem
from steepest.optim.gram import Solution
from steepest.optim.solvers import Trial

__all__ = ["LevenbergMarquardt"]

_PROBE = 0.1  # share of a direction at which the rows' curvature along it is measured
_LEAST, _MOST = 1e-24, 1e10  # of a damping that the next step begins with
_LARGEST_CURVATURE = 0.75  # of an acceleration that is believed, 2 |a| / |d|


@dataclass(frozen=True)
class LevenbergMarquardt:
    r"""Damped conditions with steps that are accepted only if they lower the sum of squares.

    .. math:: d = (J^T J + \lambda D)^{-1} J^T R, \qquad \theta \leftarrow \theta - \eta\,(d + \tfrac12 a), \qquad
        a = (J^T J + \lambda D)^{-1} J^T R''_{dd}

    After a step the closure is called again. If the sum of squares of the rows fell, the step stays and lambda is
    multiplied with ``decrease``; if not, the parameters go back, lambda is multiplied with ``increase``, and the same
    conditions are solved again. D is the running maximum of the diagonal of ``J^T J`` (Marquardt's scaling), or the
    mean eigenvalue of ``J J^T`` times the identity. a corrects for the curvature of the rows along d (geodesic
    acceleration), found by one more forward pass; it is left out where it is no small correction.

    For closures that give the same rows at the same parameters: a fixed set of conditions. On changing batches every
    batch would accept what suits itself; `LeaveOneOut` is for those. With more than ``max_primal`` parameters the
    system is solved in dual form, R x R, without the scaling; ``J^T J`` has P^2 numbers in float64.

    Several processes: every one holds its own rows, and the step is that of one process with all of them, as is the
    choice between the two forms. In primal form a step sums ``8 (P^2 + P) + 8`` bytes, once; every try broadcasts
    ``8 P + 8`` and sums 16, and its acceleration sums ``8 P + 8`` and broadcasts as many. In dual form the Gram is
    formed as in every step of `Sven`, and ``8 M`` bytes are gathered for the M rows of the rank that has most; every
    try broadcasts ``8 R + 8`` and sums ``P s + 24`` for parameters of s bytes, and its acceleration gathers ``8 M``,
    broadcasts ``8 R + 8`` and sums ``P s + 16``.

    Args:
        damping: First lambda.
        increase: Factor after a rejected step.
        decrease: Factor after an accepted step.
        acceleration: Whether to correct for curvature.
        max_primal: Largest number of parameters P for the primal form, where it is not larger than R anyway.
        max_trials: Steps that are tried before a step leaves the parameters as they were.

    Raises:
        InvalidOptionError: If an option is impossible.

    References:
        Marquardt, SIAM J. Appl. Math. 11, 1963, pages 431 to 441; acceleration: Transtrum and Sethna, arXiv 1201.5885,
        section 4.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)).double()
        >>> x = torch.linspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
        >>> opt = st.Sven(model, rows="residuals", solver=st.LevenbergMarquardt())
        >>> for _ in range(40):
        ...     loss = opt.step(lambda: (model(x) - torch.sin(3 * x)).squeeze(1))
        >>> bool(loss < 1e-8)
        True
    """

    damping: float = 1e-2
    increase: float = 2.0
    decrease: float = 1 / 3
    acceleration: bool = True
    max_primal: int = 4096
    max_trials: int = 20

    def __post_init__(self) -> None:
        check_real("damping", self.damping, low=0, open_low=True)
        check_real("increase", self.increase, low=1, open_low=True)
        check_real("decrease", self.decrease, low=0, high=1, open_low=True)
        check_integer("max_primal", self.max_primal, low=0)
        check_integer("max_trials", self.max_trials, low=1)

    def solve(self, jacobian: Jacobian, rhs: Tensor) -> Solution:
        """Solve with the first damping.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.

        Returns:
            The direction, untried.
        """
        system = DampedSystem(jacobian, self.max_primal, None)
        system.damp(self.damping)
        return system.solution(system.solved(system.target(own_rows(jacobian, rhs))))

    def search(self, jacobian: Jacobian, rhs: Tensor, memory: Tensor | None, trial: Trial) -> tuple[Solution, bool]:
        """Try steps until one lowers the sum of squares.

        Args:
            jacobian: J, R rows.
            rhs: ``[R]``.
            memory: ``memory`` of the solution before, None at the first: the damping, then the scale.
            trial: How to try a step.

        Returns:
            The last direction that was tried, with the new memory, and whether it was accepted.
        """
        damping = self.damping if memory is None else float(memory[0])
        system = DampedSystem(jacobian, self.max_primal, None if memory is None else memory[1:])
        own = own_rows(jacobian, rhs).double()
        target = system.target(own)
        nothing = torch.zeros(jacobian.num_parameters, dtype=torch.float64, device=jacobian.device)
        solution, accepted, used = system.solution(nothing), False, damping
        for _ in range(self.max_trials):
            used = damping
            if not system.damp(damping):
                damping *= 10
                continue
            flat = system.solved(target)
            if self.acceleration:
                flat = _accelerated(system, flat, own, trial)
            solution = system.solution(flat)
            accepted = trial(solution, 1.0) < trial.before
            damping *= self.decrease if accepted else self.increase
            if accepted:
                break
        if not accepted and damping > _MOST:
            damping = self.damping  # nothing helps here; whoever changes the conditions finds the usual start
        learnt = torch.cat([system.scale.new_tensor([max(damping, _LEAST)]), system.scale])
        return replace(solution, damping=used, memory=learnt), accepted


def _accelerated(system: DampedSystem, flat: Tensor, rhs: Tensor, trial: Trial) -> Tensor:
    """``d + a / 2``, from the second derivative of the rows along d; rows are those of this process."""
    start, rows = trial.rows.to(flat), trial.rows_at(system.solution(flat), _PROBE).to(flat)
    moved = system.moved(flat) + (start - rhs)  # what momentum adds to d has moved the right-hand side
    target = system.target((2 / _PROBE) * ((rows - start) / _PROBE + moved))
    if not bool(target.isfinite().all()):
        return flat
    change = system.solved(target)
    small = 2 * torch.linalg.vector_norm(change) < _LARGEST_CURVATURE * torch.linalg.vector_norm(flat)
    return flat + change / 2 if system.agreed(bool(small)) else flat
