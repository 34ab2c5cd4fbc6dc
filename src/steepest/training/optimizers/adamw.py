"""AdamW, from torch."""

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.steps import backward_step

ENTRIES = [
    OptimizerEntry(
        name="adamw",
        label="AdamW",
        description="torch.optim.AdamW",
        constructor=lambda: torch.optim.AdamW,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(3e-4, 3e-1),
        colour="#117733",
    )
]
