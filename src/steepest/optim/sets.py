"""Parameters of a Sven that AdamW trains, by the gradients of the same backward."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from steepest.distributed.jacobian import SpreadJacobian
from steepest.engine import Jacobian
from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.optim._apply import adamw_step
from steepest.optim.choices import Choices
from steepest.optim.system import System

__all__ = ["ADAMW_DEFAULTS", "apply_adamw", "columns", "other_gradients"]

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
    if isinstance(jacobian, SpreadJacobian):  # of one layout on all processes: what fails here fails on all
        return jacobian.with_local(columns(jacobian.local, names))
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


def other_gradients(system: System, choices: Choices, names: Sequence[str]) -> dict[str, Tensor]:
    """Gradients of the mean loss in parameters that AdamW trains; of several processes that of the whole batch.

    Args:
        system: The conditions.
        choices: What they were made of.
        names: Names of the parameters.

    Returns:
        The gradients, by qualified name.

    Raises:
        NonFiniteError: If one holds NaN or infinity.
    """
    if not names:
        return {}
    grads = columns(system.whole, names).vjp(_slopes(system, choices))
    bad = [name for name, grad in grads.items() if not bool(grad.isfinite().all())]
    if bad:
        raise NonFiniteError(
            f"The gradient of {bad[0]!r} holds NaN or infinity; parameters and optimizer state are unchanged. "
            "Remedy: lower the learning rate."
        )
    return grads


def _slopes(system: System, choices: Choices) -> Tensor:
    """Derivatives of the mean loss, summed over blocks, in the rows, ``[R]``."""
    rows, kappa = system.given, choices.kappa
    if choices.rows == "residuals":
        slope = 2 * rows
    elif kappa == 2:
        slope = torch.ones_like(rows)
    else:
        slope = torch.where(rows != 0, (2 / kappa) * rows ** (2 / kappa - 1), torch.zeros_like(rows))
    parts = slope.split([count * size for count, size in system.samples])
    return torch.cat([part / total for part, total in zip(parts, system.totals, strict=True)])


def apply_adamw(
    groups: Sequence[Mapping[str, Any]], state: Mapping[Tensor, Any], grads: Mapping[Tensor, Tensor]
) -> None:
    """One step of AdamW; the parameters' own ``grad`` stay as they are.

    Args:
        groups: The groups that AdamW trains.
        state: State of each parameter.
        grads: Gradient of each parameter.
    """
    for group in groups:
        kept = [param.grad for param in group["params"]]
        try:
            for param in group["params"]:
                param.grad = grads[param]
            adamw_step(group, state, 1.0)
        finally:
            for param, grad in zip(group["params"], kept, strict=True):
                param.grad = grad
