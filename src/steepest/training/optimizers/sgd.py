"""Stochastic gradient descent with momentum and without, from torch."""

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
    ),
    OptimizerEntry(
        name="sgd-plain",
        label="SGD without momentum",
        description="torch.optim.SGD without momentum",
        constructor=lambda: torch.optim.SGD,
        takes="parameters",
        step=lambda _options: backward_step,
        # Ten times those of sgd, whose momentum makes steps ten times as long.
        lr_range=(1e-2, 10.0),
        colour="#6699CC",
    ),
]
