"""How Sven solves a system and goes along the solution, as far as it helps."""

import torch
from torch import Tensor

from steepest.distributed.jacobian import own_rows
from steepest.distributed.ranks import Ranks
from steepest.optim._apply import check_magnitude
from steepest.optim.choices import Choices
from steepest.optim.deciding import decide
from steepest.optim.gram import Solution
from steepest.optim.leave_one_out import verified
from steepest.optim.memory import Memory
from steepest.optim.moving import Mover
from steepest.optim.posing import Batch
from steepest.optim.solvers import AdaptiveSolver, SearchingSolver
from steepest.optim.system import Outcome, System
from steepest.optim.trials import Trials

__all__ = ["Step"]


class Step:
    """One step: the system of a batch, and whoever moves the parameters.

    Args:
        choices: The options.
        memory: What earlier steps left.
        system: The conditions.
        mover: Moves the parameters.
        trained: What it moves.
        rate: The largest learning rate among them.
        ranks: The processes.
    """

    def __init__(
        self,
        choices: Choices,
        memory: Memory,
        system: System,
        mover: Mover,
        trained: list[Tensor],
        rate: float,
        ranks: Ranks | None,
    ) -> None:
        self._choices, self._memory, self._system, self._mover = choices, memory, system, mover
        self._trained, self._rate, self._ranks = trained, rate, ranks

    def take(self, batch: Batch) -> Outcome:
        """Solve and move.

        Args:
            batch: Looked at again where the step is tried out.

        Returns:
            What came of it.
        """
        solver, system, mover = self._choices.solver, self._system, self._mover
        if isinstance(solver, SearchingSolver):
            trials = self._trials(batch)
            solution, accepted = solver.search(system.used, system.rhs, self._memory["solver"], trials)
            scale = 1.0
        else:
            solution = self._solved()
            scale = self._guarded(solution)
            if self._choices.tries:
                trials = self._trials(batch)
                solution, accepted = verified(solution, trials.before, trials, scale)
            else:
                mover(solution, scale * solution.step, shrinks=True)
                accepted = True
        keep = accepted and system.previous is not None
        return Outcome(solution, scale, accepted, mover.direction(solution) if keep else None)

    def _trials(self, batch: Batch) -> Trials:
        system, given = self._system, self._system.given
        before, own = float(given.double().square().sum()), own_rows(system.whole, given)
        return Trials(self._trained, own, before, system.samples, self._mover, batch.rows, self._ranks)

    def _solved(self) -> Solution:
        """The solution, the same on all processes."""
        system, ranks = self._system, self._ranks
        solution = self._local() if ranks is None else decide(ranks, system.used, self._local)
        remedy = "lower lr, raise rtol, or use steepest.Damped"
        check_magnitude(solution.magnitude * max(self._rate, 1.0), system.used.dtype, remedy)
        return solution

    def _local(self) -> Solution:
        solver, system = self._choices.solver, self._system
        if isinstance(solver, AdaptiveSolver):
            return solver.adapt(system.used, system.rhs, self._memory["solver"], system.samples)
        return solver.solve(system.used, system.rhs)

    def _guarded(self, solution: Solution) -> float:
        """The factor of the norm guard; of several processes it and the decay are those of rank 0."""
        # The first step is compared with the parameters, in their norm; the others with those before, in that of the
        # metric: in the Euclidean one long steps along what hardly matters would be clipped.
        norm = solution.norm if self._memory["step"] else self._mover.norm(solution)
        scale = self._memory.guard(norm, self._choices.norm_ratio)
        if self._ranks is not None:
            told = torch.tensor([scale, self._mover.decay], dtype=torch.float64, device=self._system.jacobian.device)
            self._ranks.broadcast_([told], source=0)
            scale, self._mover.decay = told.tolist()
        return scale
