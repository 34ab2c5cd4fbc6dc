"""Adam, from torch."""

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.steps import backward_step

ENTRIES = [
    OptimizerEntry(
        name="adam",
        label="Adam",
        description="torch.optim.Adam",
        constructor=lambda: torch.optim.Adam,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(3e-4, 3e-1),
        colour="#009E73",
    )
]
