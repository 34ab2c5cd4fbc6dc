"""Optimizers along signs, for comparison: signSGD, Signum and Lion."""

from collections.abc import Callable, Mapping

import torch

from steepest.training.optimizer import OptimizerEntry
from steepest.training.peers import Lion, SignSGD
from steepest.training.steps import backward_step


def _entry(
    name: str,
    label: str,
    description: str,
    colour: str,
    kind: Callable[..., torch.optim.Optimizer],
    options: Mapping[str, object],
) -> OptimizerEntry:
    return OptimizerEntry(
        name=name,
        label=label,
        description=description,
        constructor=lambda: kind,
        takes="parameters",
        step=lambda _options: backward_step,
        lr_range=(1e-4, 1e-1),
        options=options,
        colour=colour,
    )


ENTRIES = [
    _entry("signsgd", "signSGD", "signs of the gradient", "#AA4466", SignSGD, {}),
    _entry(
        "signum", "Signum", "signs of the gradient's running mean, momentum 0.9", "#8C564B", SignSGD, {"momentum": 0.9}
    ),
    _entry("lion", "Lion", "signs of a mean of gradient and momentum, betas 0.9 and 0.99", "#999933", Lion, {}),
]
