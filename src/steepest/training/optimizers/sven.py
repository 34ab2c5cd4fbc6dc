"""Sven: singular value descent, from steepest."""

from collections.abc import Callable, Mapping

import torch

from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.steps import StepFunction, losses_step, residuals_step

# Enough to see the shape of a spectrum; a large batch has thousands of singular values in every epoch.
_SPECTRUM_POINTS = 64
_REPORTED = ("rows", "rank", "update_norm", "noise_floor", "clipped", "num_clipped", "damping", "length", "accepted")


def _constructor() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import Sven

    return Sven


def _step(options: Mapping[str, object]) -> StepFunction:
    return residuals_step if options.get("rows") == "residuals" else losses_step


def _finds_length(options: Mapping[str, object]) -> bool:
    from steepest.optim import KalmanFilter, LeaveOneOut, LevenbergMarquardt

    return isinstance(options.get("solver") or LeaveOneOut(), KalmanFilter | LeaveOneOut | LevenbergMarquardt)


def _diagnose(optimizer: torch.optim.Optimizer) -> Diagnosis:
    diagnostics = getattr(optimizer, "diagnostics", None)
    found = {name: getattr(diagnostics, name, None) for name in _REPORTED}
    numbers: dict[str, float | tuple[float, ...]] = {
        name: float(value) for name, value in found.items() if value is not None
    }
    spectrum = getattr(diagnostics, "spectrum", None)
    if spectrum is not None:
        chosen = torch.linspace(0, len(spectrum) - 1, min(len(spectrum), _SPECTRUM_POINTS)).round().long()
        numbers["spectrum"] = tuple(spectrum[chosen].tolist())
    return numbers


ENTRIES = [
    OptimizerEntry(
        name="sven",
        label="Sven",
        description="steepest.Sven: minimum-norm step on all samples of the batch at once",
        constructor=_constructor,
        takes="model",
        step=_step,
        lr_range=(1e-2, 1.0),
        # What the tasks' stored learning rates were tuned with; the constructor's own defaults need no rate.
        kind_options={
            "classification": {"solver": {"type": "Damped", "damping": 0.1}},
            "regression": {"rows": "residuals", "solver": {"type": "Damped", "damping": 0.1}},
        },
        finds_length=_finds_length,
        diagnose=_diagnose,
        colour="#D55E00",
    )
]
