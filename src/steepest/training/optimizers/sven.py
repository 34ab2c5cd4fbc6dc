"""Sven: singular value descent, from steepest."""

from collections.abc import Callable, Mapping

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.steps import StepFunction, losses_step, residuals_step

_REPORTED = ("rank", "update_norm", "noise_floor", "clipped", "num_clipped")


def _constructor() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import Sven

    return Sven


def _step(options: Mapping[str, object]) -> StepFunction:
    return residuals_step if options.get("rows") == "residuals" else losses_step


def _diagnose(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    diagnostics = getattr(optimizer, "diagnostics", None)
    found = {name: getattr(diagnostics, name, None) for name in _REPORTED}
    return {name: float(value) for name, value in found.items() if value is not None}


ENTRIES = [
    OptimizerEntry(
        name="sven",
        label="Sven",
        description="steepest.Sven: minimum-norm step on all samples of the batch at once",
        constructor=_constructor,
        takes="model",
        step=_step,
        lr_range=(1e-2, 1.0),
        diagnose=_diagnose,
        colour="#D55E00",
    )
]
