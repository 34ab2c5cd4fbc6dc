"""What all optimizers do to parameters beside their own update."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from steepest.errors import NonFiniteError

__all__ = ["adamw_step", "check_magnitude", "decay", "descend"]


def decay(params: Sequence[Tensor], *, lr: float | Tensor, weight_decay: float, capturable: bool = False) -> None:
    """Decoupled weight decay, ``theta <- (1 - lr * weight_decay) theta``, in place.

    Args:
        params: Parameters.
        lr: Learning rate.
        weight_decay: Decay.
        capturable: Leave a tensor lr on its device instead of reading it.
    """
    if weight_decay != 0:
        torch._foreach_mul_(list(params), 1 - (lr if capturable else float(lr)) * weight_decay)


def check_magnitude(value: float, dtype: torch.dtype, remedy: str) -> None:
    """Raise before an update that would overflow changes anything.

    Args:
        value: Bound on the numbers of the update.
        dtype: dtype of the parameters.
        remedy: What the user can do.

    Raises:
        NonFiniteError: If it is NaN or beyond what the dtype holds.
    """
    if not value < torch.finfo(dtype).max:
        raise NonFiniteError(
            f"The update reaches {value:g}, which {dtype} does not hold; parameters and optimizer state are unchanged. "
            f"Remedy: {remedy}."
        )


def descend(
    params: Sequence[Tensor], moves: Sequence[Tensor], state: Mapping[Tensor, Any], group: Mapping[str, Any]
) -> None:
    """Move parameters against directions, with momentum and decoupled weight decay.

    Args:
        params: Parameters.
        moves: A direction for each.
        state: State of each; holds its momentum.
        group: Their group, with ``lr``, ``momentum`` and ``weight_decay``.
    """
    if not params:
        return
    if group["momentum"]:
        buffers = []
        for param, move in zip(params, moves, strict=True):
            if "momentum_buffer" not in state[param]:
                state[param]["momentum_buffer"] = torch.zeros_like(move)
            buffers.append(state[param]["momentum_buffer"])
        torch._foreach_mul_(buffers, group["momentum"])
        torch._foreach_add_(buffers, list(moves))
        moves = buffers
    decay(params, lr=group["lr"], weight_decay=group["weight_decay"])
    torch._foreach_add_(list(params), list(moves), alpha=-float(group["lr"]))


def adamw_step(group: Mapping[str, Any], state: Mapping[Tensor, Any], loss_scale: float) -> None:
    """One step of torch's AdamW on the parameters of a group that have a gradient.

    Args:
        group: The group, with ``lr``, ``betas``, ``eps`` and ``weight_decay``.
        state: State of each parameter.
        loss_scale: What the gradients are to be divided by.
    """
    params = [p for p in group["params"] if p.grad is not None]
    for param in params:
        if "exp_avg" not in state[param]:
            moments = {"exp_avg": torch.zeros_like(param), "exp_avg_sq": torch.zeros_like(param)}
            state[param].update(step=torch.zeros(()), **moments)
    beta1, beta2 = group["betas"]
    adamw(
        params,
        [p.grad if loss_scale == 1 else p.grad / loss_scale for p in params],
        [state[param]["exp_avg"] for param in params],
        [state[param]["exp_avg_sq"] for param in params],
        [],
        [state[param]["step"] for param in params],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
