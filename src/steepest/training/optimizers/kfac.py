"""KFAC and FOP, from steepest, and KFAC at twice the learning rate, which every study of FOP needs beside it."""

from collections.abc import Callable

import torch

from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.steps import backward_step

# Of the settings that were tried on digits this one was the best for KFAC, and FOP was given the same.
_OPTIONS = {"solver": {"type": "Cholesky"}, "damping": 0.03}


def _kfac() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import KFAC

    return KFAC


def _kfac_twice() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import KFAC

    class TwiceKFAC(KFAC):
        """KFAC whose learning rate is twice the one that it is given."""

        def __init__(self, model: torch.nn.Module, *, lr: float = 0.1, **options: object) -> None:
            super().__init__(model, lr=2 * lr, **options)  # type: ignore[arg-type]

    return TwiceKFAC


def _fop() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import FOP

    return FOP


def _diagnose(optimizer: torch.optim.Optimizer) -> Diagnosis:
    found = getattr(optimizer, "diagnostics", None)
    numbers = {} if found is None else {"update_norm": float(found.update_norm), "clip": float(found.clip)}
    layers = getattr(optimizer, "layers", {})
    if layers:
        numbers["r"] = sum(layer.r for layer in layers.values()) / len(layers)
        numbers["gate"] = sum(layer.gate for layer in layers.values()) / len(layers)
    return numbers


ENTRIES = [
    OptimizerEntry(
        name="kfac",
        label="KFAC",
        description="steepest.KFAC: natural gradient with Kronecker-factored curvature",
        constructor=_kfac,
        takes="model",
        step=lambda _options: backward_step,
        lr_range=(1e-2, 1.0),
        options=_OPTIONS,
        diagnose=_diagnose,
        colour="#56B4E9",
    ),
    OptimizerEntry(
        name="kfac-2x",
        label="KFAC 2x",
        description="KFAC at twice the learning rate that it is given: what FOP is to be compared with",
        constructor=_kfac_twice,
        takes="model",
        step=lambda _options: backward_step,
        lr_range=(1e-2, 1.0),
        options=_OPTIONS,
        diagnose=_diagnose,
        colour="#999999",
    ),
    OptimizerEntry(
        name="fop",
        label="FOP",
        description="steepest.FOP: KFAC corrected by what the two halves of a batch disagree about",
        constructor=_fop,
        takes="model",
        step=lambda _options: backward_step,
        lr_range=(1e-2, 1.0),
        options=_OPTIONS,
        diagnose=_diagnose,
        colour="#E69F00",
    ),
]
