"""The two synthetic regression problems of the Sven paper (arXiv 2604.01279).

Pool, validation and test hold 10,000 samples each, drawn from three generators; targets are normalised by
the pool's mean and standard deviation.
"""

from itertools import combinations_with_replacement
from math import prod, sqrt

import torch
from torch import Tensor

from steepest.training.data import Split, Splits
from steepest.training.losses import SquaredError
from steepest.training.metrics import R2
from steepest.training.models import hidden
from steepest.training.task import Task
from steepest.training.tuned import TUNED

_SAMPLES = 10_000
_VARIABLES, _DEGREE = 6, 4


def _generators(data_seed: int) -> list[torch.Generator]:
    # Four consecutive seeds for each data seed: pool, validation, test and (polynomial) coefficients.
    return [torch.Generator().manual_seed(4 * data_seed + part) for part in range(4)]


def _normalised(parts: list[tuple[Tensor, Tensor]]) -> Splits:
    pool_targets = parts[0][1]
    mean, std = pool_targets.mean(), pool_targets.std()
    return Splits(*(Split(inputs, (targets - mean) / std) for inputs, targets in parts))


def _toy_1d(data_seed: int) -> Splits:
    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = 2 * torch.rand(_SAMPLES, 1, generator=generator) - 1
        return x, torch.exp(-10 * x**2) * torch.sin(2 * x)

    return _normalised([draw(generator) for generator in _generators(data_seed)[:3]])


def exponents(variables: int, degree: int) -> list[tuple[int, ...]]:
    """Exponents of all monomials up to a total degree, the constant first.

    Args:
        variables: Number of variables.
        degree: Largest total degree.

    Returns:
        One tuple of exponents per monomial.

    Example:
        >>> len(exponents(6, 4))
        210
    """
    return [
        tuple(chosen.count(variable) for variable in range(variables))
        for total in range(degree + 1)
        for chosen in combinations_with_replacement(range(variables), total)
    ]


def _double_factorial(number: int) -> int:
    return prod(range(number, 0, -2))


def _polynomial(data_seed: int) -> Splits:
    *sample_generators, coefficient_generator = _generators(data_seed)
    powers = exponents(_VARIABLES, _DEGREE)
    # E[x^(2p)] = (2p - 1)!! for x ~ N(0, 1): every monomial gets the same expected square.
    scale = torch.tensor([1 / sqrt(prod(_double_factorial(2 * p - 1) for p in power)) for power in powers])
    coefficients = torch.randn(len(powers), generator=coefficient_generator) * scale

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(_SAMPLES, _VARIABLES, generator=generator)
        table = torch.stack([x**p for p in range(_DEGREE + 1)])
        y = torch.zeros(_SAMPLES)
        for coefficient, power in zip(coefficients, powers, strict=True):
            y += coefficient * torch.stack([table[p, :, j] for j, p in enumerate(power)]).prod(dim=0)
        return x, y.unsqueeze(1)

    return _normalised([draw(generator) for generator in sample_generators])


ENTRIES = [
    Task(
        name="toy_1d",
        description="y = exp(-10 x^2) sin(2 x) on [-1, 1], 10,000 samples; MLP 1-16-16-16-1",
        kind="regression",
        load=_toy_1d,
        model=hidden(16, 16, 16),
        loss=SquaredError(),
        metrics=(R2,),
        batch_size=32,
        epochs=20,
        options={
            "sven": {
                "lr": 0.215,
                "rows": "residuals",
                "solver": {"type": "TruncatedEigh", "rtol": 1e-6, "exponent": 0.5},
            },
            "sgd": {"lr": 0.1},
            "adam": {"lr": 0.0949},
            "lbfgs": {"lr": 0.01},
        },
        options_source=TUNED,
    ),
    Task(
        name="polynomial",
        description="random polynomial of degree 4 in 6 variables, 10,000 samples; MLP 6-16-16-16-1",
        kind="regression",
        load=_polynomial,
        model=hidden(16, 16, 16),
        loss=SquaredError(),
        metrics=(R2,),
        batch_size=32,
        epochs=20,
        options={
            "sven": {"lr": 0.464, "rows": "residuals", "solver": {"type": "Damped", "damping": 0.1}},
            "sgd": {"lr": 0.01},
            "adam": {"lr": 0.00949},
            "lbfgs": {"lr": 0.001},
        },
        options_source=TUNED,
    ),
]
