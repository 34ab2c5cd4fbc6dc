"""L-BFGS on mini-batches, from torch."""

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.steps import closure_step

ENTRIES = [
    OptimizerEntry(
        name="lbfgs",
        label="L-BFGS",
        description="torch.optim.LBFGS on mini-batches: 4 inner iterations, history 10, strong Wolfe search",
        constructor=lambda: torch.optim.LBFGS,
        takes="parameters",
        step=lambda _options: closure_step,
        lr_range=(1e-3, 1.0),
        options={"max_iter": 4, "history_size": 10, "line_search_fn": "strong_wolfe"},
        colour="#CC79A7",
    )
]
