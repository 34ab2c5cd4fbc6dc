"""KFAC and FOP, from steepest, and KFAC at twice the learning rate, which every study of FOP needs beside it."""

from collections.abc import Callable

import torch

from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.steps import backward_step

# Of the settings that were tried on digits with KFAC these were among the best, and FOP was given the same. With the
# default kl_clip of 1e-3 every step is clipped, and the learning rate decides nothing.
_OPTIONS = {"solver": {"type": "Cholesky"}, "damping": 0.03, "kl_clip": 1e-2}


def _kfac() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import KFAC

    return KFAC


def _kfac_twice() -> Callable[..., torch.optim.Optimizer]:
    from steepest.optim import KFAC

    class TwiceKFAC(KFAC):
        """KFAC whose steps are twice as long as its options say, clipped ones as well."""

        def __init__(
            self, model: torch.nn.Module, *, lr: float = 0.1, kl_clip: float | None = 1e-3, **options: object
        ) -> None:
            # kl_clip bounds the square of a step.
            clip = None if kl_clip is None else 4 * kl_clip
            super().__init__(model, lr=2 * lr, kl_clip=clip, **options)  # type: ignore[arg-type]

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


def _entry(
    name: str,
    label: str,
    description: str,
    colour: str,
    constructor: Callable[[], Callable[..., torch.optim.Optimizer]],
) -> OptimizerEntry:
    return OptimizerEntry(
        name=name,
        label=label,
        description=description,
        constructor=constructor,
        takes="model",
        step=lambda _options: backward_step,
        lr_range=(3e-3, 3e-1),
        options=_OPTIONS,
        diagnose=_diagnose,
        colour=colour,
    )


ENTRIES = [
    _entry("kfac", "KFAC", "steepest.KFAC: natural gradient with Kronecker-factored curvature", "#56B4E9", _kfac),
    _entry(
        "kfac-2x",
        "KFAC 2x",
        "KFAC with steps twice as long as it is told: what FOP is to be compared with",
        "#999999",
        _kfac_twice,
    ),
    _entry(
        "fop",
        "FOP",
        "steepest.FOP: KFAC corrected by what the two halves of a batch disagree about",
        "#E69F00",
        _fop,
    ),
]
