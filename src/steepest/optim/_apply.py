"""The one place where updates reach parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor

from steepest.errors import NonFiniteError

__all__ = ["apply_update", "check_finite", "global_norm"]


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all entries together.

    Args:
        tensors: At least one tensor, possibly on several devices.

    Returns:
        A scalar in float64 on the first tensor's device.
    """
    device = tensors[0].device
    norms = torch._foreach_norm(list(tensors))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(device, torch.float64) for norm in norms]))
    return total


def apply_update(
    params: Sequence[Tensor],
    updates: Sequence[Tensor],
    *,
    lr: float | Tensor,
    weight_decay: float = 0.0,
    scale: float = 1.0,
) -> None:
    """``theta <- (1 - lr * weight_decay) theta - lr * scale * update``, in place.

    Args:
        params: Parameters.
        updates: One for each.
        lr: Learning rate.
        weight_decay: Decoupled decay.
        scale: Factor of the updates alone.
    """
    rate = float(lr)
    if weight_decay != 0:
        torch._foreach_mul_(list(params), 1 - rate * weight_decay)
    torch._foreach_add_(list(params), list(updates), alpha=-rate * scale)


def check_finite(value: float, what: str, remedy: str) -> None:
    """Raise before anything is changed.

    Args:
        value: A number that is finite if all is well.
        what: What it is.
        remedy: What to do.

    Raises:
        NonFiniteError: If it is NaN or infinite.
    """
    if not value < float("inf"):
        raise NonFiniteError(f"{what} is {value}; parameters and optimizer state are unchanged. Remedy: {remedy}.")
