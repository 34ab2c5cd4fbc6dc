"""Problems with measurements: an unknown coefficient of an equation, and noisy data with constraints; in float64."""

import math

import torch
from torch import Tensor, nn

from steepest.nn.derivatives import WithDerivatives
from steepest.training.conditions import (
    DAMPED,
    RELATIVE_ERROR,
    Condition,
    Conditions,
    derivative_network,
    equation_task,
    network,
    value,
)
from steepest.training.data import Splits
from steepest.training.metrics import Metric
from steepest.training.points import GRIDS, SQUARE, Block, edge, grid, sines, sobol, split_of

_BOTH = ((0, 0), (1, 1))
_MODE = sines(1, 1)


class _WithCoefficient(nn.Module):
    """A network with derivatives, and an unknown number as the last column of its output."""

    def __init__(self, model: WithDerivatives, start: float) -> None:
        super().__init__()
        self.model = model
        self.coefficient = nn.Parameter(torch.tensor([[start]], dtype=torch.float64))

    def forward(self, points: Tensor) -> Tensor:
        """Columns of values, derivatives, and the coefficient."""
        return torch.cat([self.model(points), self.coefficient.expand(len(points), 1)], 1)


_COEFFICIENT, _MEASURED, _NOISE = 2.5, 50, 0.01


def _coefficient_error(outputs: Tensor, _targets: Tensor) -> float:
    return abs(outputs[:, -1].detach().mean().item() - _COEFFICIENT) / _COEFFICIENT


_COEFFICIENT_ERROR = Metric(
    "coefficient_error", "relative error of c", higher_is_better=False, compute=_coefficient_error
)


def _load_inverse(data_seed: int) -> Splits:
    box, points, side = SQUARE, 512, 32
    generator = torch.Generator().manual_seed(data_seed)
    parts = []
    for where, along in ((sobol(points, box, data_seed), side), *((grid(count, box), count) for count in GRIDS)):
        source = Block(0, where, 2 * math.pi**2 * _COEFFICIENT * _MODE(where))
        measured = sobol(_MEASURED, box, data_seed + 1)
        noise = _NOISE * torch.randn(_MEASURED, generator=generator, dtype=torch.float64)
        blocks = [source, Block(1, edge(along, box), 0.0), Block(2, measured, _MODE(measured) + noise)]
        parts.append(split_of(blocks, _MODE))
    return Splits(*parts)


INVERSE = equation_task(
    "inverse_poisson",
    "-c laplace u = f with the unknown c, from 50 values of u with noise of 1 %; MLP 2-20-20-1, tanh, float64",
    _load_inverse,
    lambda _shape: _WithCoefficient(WithDerivatives(network(SQUARE, (20, 20)), 2, second=_BOTH), start=1.0),
    Conditions(
        (
            Condition("equation", lambda u, data, c: c[:, 0] * u.laplacian()[:, 0] + data, 1.0, 512),
            Condition("edge", value, 100.0, 4 * 32),
            Condition("measured", value, 100.0, _MEASURED),
        ),
        num_inputs=2,
        second=_BOTH,
        coefficients=1,
    ),
    metrics=(RELATIVE_ERROR, _COEFFICIENT_ERROR),
    epochs=100,
)


def _curve(points: Tensor) -> Tensor:
    x = points[:, 0]
    return torch.sin(3 * math.pi * x) * torch.exp(-2 * x)


def _load_fit(data_seed: int) -> Splits:
    """Noisy values; u = 0 and u' = 3 pi at 0, u = 0 and u' = -3 pi / e^2 at 1."""
    ends = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    slopes = torch.tensor([3 * math.pi, -3 * math.pi * math.exp(-2)], dtype=torch.float64)
    generator = torch.Generator().manual_seed(data_seed)
    parts = []
    for count in (60, *(20 * side for side in GRIDS)):
        x = (
            torch.rand(count, 1, generator=generator, dtype=torch.float64)
            if count == 60
            else grid(count, ((0.0, 1.0),))
        )
        noise = 0.05 * torch.randn(count, generator=generator, dtype=torch.float64)
        blocks = [Block(0, x, _curve(x) + noise), Block(1, ends, 0.0), Block(2, ends, slopes)]
        parts.append(split_of(blocks, _curve))
    return Splits(*parts)


CONSTRAINED = equation_task(
    "constrained_fit",
    "a curve through 60 values with noise of 0.05, its values and slopes at both ends given; MLP 1-10-10-1, float64",
    _load_fit,
    derivative_network(((0.0, 1.0),), (10, 10), ()),
    Conditions(
        (
            Condition("data", value, 1.0, 60),
            Condition("value", value, 10.0, 2),
            Condition("slope", lambda u, data, _: u.d(0)[:, 0] - data, 1.0, 2),
        ),
        num_inputs=1,
    ),
    epochs=100,
    sven=DAMPED,
)


ENTRIES = [INVERSE, CONSTRAINED]
