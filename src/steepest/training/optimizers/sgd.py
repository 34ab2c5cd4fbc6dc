"""Stochastic gradient descent with momentum, from torch."""

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.steps import backward_step

ENTRIES = [
    OptimizerEntry(
        name="sgd",
        label="SGD",
        description="torch.optim.SGD with momentum 0.9",
        constructor=lambda: torch.optim.SGD,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(1e-3, 1.0),
        options={"momentum": 0.9},
        colour="#0072B2",
    )
]
