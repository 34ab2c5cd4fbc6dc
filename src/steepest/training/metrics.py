"""Numbers reported beside the loss."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

__all__ = ["ACCURACY", "PSNR", "R2", "Metric"]


@dataclass(frozen=True)
class Metric:
    """A number computed from all outputs and targets of a split.

    Attributes:
        name: Key in the records.
        label: Heading in tables and plots.
        higher_is_better: Direction of the best value.
        compute: Function of outputs and targets.
    """

    name: str
    label: str
    higher_is_better: bool
    compute: Callable[[Tensor, Tensor], float]


def _accuracy(outputs: Tensor, targets: Tensor) -> float:
    return (outputs.argmax(dim=1) == targets).double().mean().item()


def _r2(outputs: Tensor, targets: Tensor) -> float:
    # float64: on toy_1d 1 - R2 is near 1e-9, which float32 cannot hold.
    predicted, wanted = outputs.double(), targets.double()
    residual = (predicted - wanted).square().sum()
    return 1.0 - (residual / (wanted - wanted.mean(dim=0)).square().sum()).item()


def _psnr(outputs: Tensor, targets: Tensor) -> float:
    error = (outputs.double() - targets.double()).square().mean().item()
    return -10.0 * math.log10(error) if error > 0 else math.inf


ACCURACY = Metric("accuracy", "accuracy", higher_is_better=True, compute=_accuracy)
R2 = Metric("r2", "R2", higher_is_better=True, compute=_r2)
# Peak signal-to-noise ratio of values whose range is 1 wide; a shift of outputs and targets changes nothing.
PSNR = Metric("psnr", "PSNR in dB", higher_is_better=True, compute=_psnr)
