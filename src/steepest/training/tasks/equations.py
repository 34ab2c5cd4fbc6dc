"""Differential equations as tasks, in float64, all conditions at once.

Training points are scrambled Sobol points of the data seed, in time too; validation and test are two regular grids, on
which the relative L2 error is taken. The weights stand with the conditions.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from steepest.nn.jets import Jet
from steepest.training.cole_hopf import burgers
from steepest.training.conditions import Condition, Conditions, derivative_network, equation_task, value
from steepest.training.points import SQUARE, Block, Box, Function, edge, face, problem, sines
from steepest.training.task import Task

_BOTH = ((0, 0), (1, 1))


def _elliptic(
    name: str,
    description: str,
    box: Box,
    solution: Function,
    source: Function,
    residual: Callable[[Jet, Tensor, Tensor], Tensor],
    *,
    points: int,
    side: int,
    weight: float,
    hidden: Sequence[int],
) -> Task:
    """An equation of second order in a rectangle, zero on its edge."""
    loss = Conditions(
        (Condition("equation", residual, 1.0, points), Condition("edge", value, weight, 4 * side)),
        num_inputs=2,
        second=_BOTH,
    )
    load = problem(points, side, box, source, lambda along: [Block(1, edge(along, box), 0.0)], solution)
    return equation_task(name, description, load, derivative_network(box, hidden, _BOTH), loss)


_WIDE: Box = ((-1.0, 1.0), (-1.0, 1.0))
_MODE, _WAVES = sines(1, 1), sines(1, 4)

POISSON = _elliptic(
    "poisson_2d",
    "-laplace u = 2 pi^2 sin(pi x) sin(pi y) on the unit square, u = 0 on its edge; MLP 2-32-32-1, tanh, float64",
    SQUARE,
    _MODE,
    lambda points: 2 * math.pi**2 * _MODE(points),
    lambda u, data, _: u.laplacian()[:, 0] + data,
    points=1024,
    side=64,
    weight=100.0,
    hidden=(32, 32),
)
HELMHOLTZ = _elliptic(
    "helmholtz_2d",
    "laplace u + u = f on [-1, 1]^2 with the solution sin(pi x) sin(4 pi y); MLP 2-32-32-1, tanh, float64",
    _WIDE,
    _WAVES,
    lambda points: (1 - 17 * math.pi**2) * _WAVES(points),
    lambda u, data, _: u.laplacian()[:, 0] + u.value[:, 0] - data,
    points=1536,
    side=64,
    weight=1000.0,
    hidden=(32, 32),
)


def _evolution(
    name: str,
    description: str,
    box: Box,
    solution: Function,
    residual: Callable[[Jet, Tensor, Tensor], Tensor],
    *,
    points: int,
    side: int,
    weight: float,
    hidden: Sequence[int],
) -> Task:
    """An equation in x and t: zero at both ends of the interval, and given values at the beginning."""
    loss = Conditions(
        (
            Condition("equation", residual, 1.0, points),
            Condition("ends", value, weight, 2 * side),
            Condition("beginning", value, weight, side),
        ),
        num_inputs=2,
        second=((0, 0),),
    )

    def others(along: int) -> list[Block]:
        start = face(along, box, 1, box[1][0])
        ends = torch.cat([face(along, box, 0, place) for place in box[0]])
        return [Block(1, ends, 0.0), Block(2, start, solution(start))]

    load = problem(points, side, box, lambda where: where.new_zeros(len(where)), others, solution)
    return equation_task(name, description, load, derivative_network(box, hidden, ((0, 0),)), loss)


_DIFFUSION, _VISCOSITY = 0.1, 0.02


def _heat(points: Tensor) -> Tensor:
    x, t = math.pi * points[:, 0], _DIFFUSION * math.pi**2 * points[:, 1]
    return torch.sin(x) * torch.exp(-t) + 0.5 * torch.sin(3 * x) * torch.exp(-9 * t)


HEAT = _evolution(
    "heat_1d",
    "u_t = 0.1 u_xx on [0, 1] for t to 1, from sin(pi x) + sin(3 pi x) / 2; MLP 2-32-32-1, tanh, float64",
    SQUARE,
    _heat,
    lambda u, _data, _unknown: (u.d(1) - _DIFFUSION * u.d(0, 0))[:, 0],
    points=1024,
    side=64,
    weight=10.0,
    hidden=(32, 32),
)
BURGERS = _evolution(
    "burgers_1d",
    "u_t + u u_x = 0.02 u_xx on [-1, 1] for t to 1, from -sin(pi x), with a steep front; MLP 2-20-20-20-1, float64",
    ((-1.0, 1.0), (0.0, 1.0)),
    lambda points: burgers(points, _VISCOSITY),
    lambda u, _data, _unknown: (u.d(1) + u.value * u.d(0) - _VISCOSITY * u.d(0, 0))[:, 0],
    points=2048,
    side=64,
    weight=10.0,
    hidden=(20, 20, 20),
)

ENTRIES = [POISSON, HELMHOLTZ, HEAT, BURGERS]
