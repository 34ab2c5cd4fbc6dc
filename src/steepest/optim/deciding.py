"""One solution for several processes."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.agreement import fail_together
from steepest.distributed.ranks import Ranks
from steepest.engine import Jacobian
from steepest.optim.gram import Solution

__all__ = ["decide"]


def decide(ranks: Ranks, jacobian: Jacobian, solve: Callable[[], Solution]) -> Solution:
    """Solve on every rank, since forming the system takes all of them, and use what rank 0 found.

    Args:
        ranks: The ranks.
        jacobian: Of all rows.
        solve: Gives the solution.

    Returns:
        It, the same on all ranks to the bit.
    """
    failure: Exception | None = None
    mine: Solution | None = None
    told = torch.zeros(10, dtype=torch.float64, device=jacobian.device)
    try:
        mine = solve()
        length = -1 if mine.spectrum is None else len(mine.spectrum)
        learnt = -1 if mine.memory is None else len(mine.memory)
        damping = float("nan") if mine.damping is None else mine.damping
        numbers = (
            1.0, mine.rank, mine.noise_floor, mine.norm, mine.magnitude, length, mine.weights is None, mine.step,
            damping, learnt,
        )  # fmt: skip
        told = torch.tensor([float(n) for n in numbers], dtype=torch.float64, device=jacobian.device)
    except Exception as error:
        failure = error
    ranks.broadcast_([told], source=0)
    solved, rank, noise_floor, norm, magnitude, length, explicit, step, damping, learnt = told.tolist()
    if not solved:
        fail_together(ranks, failure)
    source = mine if ranks.rank == 0 else None
    options: dict[str, Any] = {"step": step, "damping": None if math.isnan(damping) else damping}
    if explicit:
        options["explicit"] = _explicit(jacobian, source)
        ranks.broadcast_(list(options["explicit"].values()), source=0)
    else:
        options["weights"] = _vector(jacobian.num_rows, jacobian, source.weights if source else None)
        ranks.broadcast_([options["weights"]], source=0)
    spectrum = None
    if length >= 0:
        spectrum = _vector(int(length), jacobian, source.spectrum if source else None)
        ranks.broadcast_([spectrum], source=0)
    if learnt >= 0:
        options["memory"] = _vector(int(learnt), jacobian, source.memory if source else None)
        ranks.broadcast_([options["memory"]], source=0)
    return Solution(jacobian, int(rank), spectrum, noise_floor, norm, magnitude, **options)


def _vector(length: int, jacobian: Jacobian, value: Tensor | None) -> Tensor:
    """Rank 0's numbers in float64, or room for them."""
    if value is not None:
        return value.double()
    return torch.empty(length, dtype=torch.float64, device=jacobian.device)


def _explicit(jacobian: Jacobian, solution: Solution | None) -> dict[str, Tensor]:
    if solution is not None:
        return solution.direction()
    return {
        name: torch.empty(shape, dtype=jacobian.dtype, device=jacobian.device)
        for name, shape in jacobian.shapes.items()
    }
