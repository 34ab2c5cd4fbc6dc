"""Parameters of a Sven that AdamW trains, by the gradients of the same backward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.engine import Jacobian
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.optim._apply import adamw_step
from steepest.optim.rows import RowKind

__all__ = ["ADAMW_DEFAULTS", "apply_adamw", "columns", "loss_gradient", "row_weights"]

ADAMW_DEFAULTS: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


def columns(jacobian: Jacobian, names: Sequence[str]) -> Jacobian:
    """Keep some parameters of a Jacobian.

    Args:
        jacobian: The Jacobian.
        names: Qualified names to keep.

    Returns:
        The Jacobian in these parameters alone.

    Raises:
        InvalidOptionError: If weight and bias of a layer are parted.
    """
    wanted = set(names)
    kept = []
    for record in jacobian.records:
        inside = wanted.intersection(record.names)
        if not inside:
            continue
        if len(inside) < len(record.names):
            parted = ", ".join(map(repr, record.names))
            raise InvalidOptionError(
                f"Parameters {parted} belong to one layer, and Sven trains some of them and AdamW the others: put all "
                "parameters of a layer into one group."
            )
        kept.append(record)
    shapes = {name: shape for name, shape in jacobian.shapes.items() if name in wanted}
    return Jacobian(kept, shapes, jacobian.num_rows, jacobian.max_memory, jacobian.device, jacobian.dtype)


def row_weights(rhs: Tensor, samples: Sequence[tuple[int, int]], kind: RowKind, kappa: float) -> Tensor:
    """Derivatives of the mean loss, summed over blocks, in the rows.

    Args:
        rhs: The rows, ``[R]``.
        samples: Number of samples and rows of each, block by block.
        kind: What the rows were made of.
        kappa: Rows of losses are ``l ** (kappa / 2)``.

    Returns:
        ``[R]``.
    """
    if kind == "residuals":
        slope = 2 * rhs
    elif kappa == 2:
        slope = torch.ones_like(rhs)
    else:
        slope = torch.where(rhs != 0, (2 / kappa) * rhs ** (2 / kappa - 1), torch.zeros_like(rhs))
    parts = slope.split([count * size for count, size in samples])
    return torch.cat([part / count for part, (count, _) in zip(parts, samples, strict=True)])


def loss_gradient(jacobian: Jacobian, weights: Tensor, remedy: str) -> dict[str, Tensor]:
    """Gradient of the mean loss.

    Args:
        jacobian: Of the rows, in the parameters that AdamW trains.
        weights: `row_weights`.
        remedy: What the user can do if it is not finite.

    Returns:
        It, by qualified name.

    Raises:
        NonFiniteError: If it holds NaN or infinity.
    """
    grads = jacobian.vjp(weights)
    bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"The gradient of {bad[0]!r} holds NaN or infinity; parameters and optimizer state are unchanged. "
            f"Remedy: {remedy}."
        )
    return grads


def apply_adamw(groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], grads: Mapping[int, Tensor]) -> None:
    """One step of AdamW; the parameters' own ``grad`` stay as they are.

    Args:
        groups: The groups that AdamW trains.
        state: State of each parameter.
        grads: Gradients by the id of the parameter.
    """
    for group in groups:
        kept = [param.grad for param in group["params"]]
        try:
            for param in group["params"]:
                param.grad = grads[id(param)]
            adamw_step(group, state, 1.0)
        finally:
            for param, grad in zip(group["params"], kept, strict=True):
                param.grad = grad
