"""What all optimizers do to parameters beside their own update."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.errors import NonFiniteError

__all__ = ["check_magnitude", "decay"]


def decay(params: Sequence[Tensor], *, lr: float | Tensor, weight_decay: float) -> None:
    """Decoupled weight decay, ``theta <- (1 - lr * weight_decay) theta``, in place.

    Args:
        params: Parameters.
        lr: Learning rate.
        weight_decay: Decay.
    """
    if weight_decay != 0:
        torch._foreach_mul_(list(params), 1 - float(lr) * weight_decay)


def check_magnitude(value: float, dtype: torch.dtype) -> None:
    """Raise before an update that would overflow changes anything.

    Args:
        value: Bound on the numbers of the update.
        dtype: dtype of the parameters.

    Raises:
        NonFiniteError: If it is NaN or beyond what the dtype holds.
    """
    if not value < torch.finfo(dtype).max:
        raise NonFiniteError(
            f"The update reaches {value:g}, which {dtype} does not hold; parameters and optimizer state are unchanged. "
            "Remedy: lower lr, raise rtol, or use steepest.Damped."
        )
