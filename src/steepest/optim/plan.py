"""A KFAC step before it is taken: what it will do to every layer, and whether that can be done."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steepest.optim.blocks import Block
from steepest.optim.curvature import Curvature

__all__ = ["Draft", "Planned", "clip_factor", "read", "total", "total_norm"]


@dataclass(frozen=True, eq=False)
class Draft:
    """A layer in a step, before it is preconditioned; ``is_stale`` where it is to be decomposed anew."""

    block: Block
    group: Mapping[str, Any]
    curvature: Curvature
    gradient: Tensor
    is_stale: bool


@dataclass(frozen=True, eq=False)
class Planned:
    """What a step will do to one layer, before it does anything.

    Args:
        block: The layer.
        curvature: Its new curvature.
        gradient: Its gradient.
        direction: That, preconditioned.
        is_fresh: Whether the curvature was decomposed for this step.
        found: What a subclass of KFAC tells of the layer.
    """

    block: Block
    curvature: Curvature
    gradient: Tensor
    direction: Tensor
    is_fresh: bool
    found: Tensor | None = None


def clip_factor(group: Mapping[str, Any], layers: Sequence[Planned]) -> Tensor:
    """Nu of kl_clip for a group, 0-dimensional, without waiting for the device.

    Args:
        group: With ``lr`` and ``kl_clip``.
        layers: Its layers.

    Returns:
        A number in (0, 1].
    """
    if group["kl_clip"] is None or not layers:
        return torch.ones(()) if not layers else layers[0].direction.new_ones(())
    change = total([(layer.gradient * layer.direction).sum() for layer in layers])
    size = (float(group["lr"]) ** 2 * change).clamp(min=torch.finfo(torch.float64).tiny)
    nu: Tensor = (group["kl_clip"] / size).sqrt().clamp(max=1.0)
    return nu


def total(numbers: Sequence[Tensor]) -> Tensor:
    """Sum of 0-dimensional tensors in float64, on the device of the first."""
    return torch.stack([number.double().to(numbers[0].device) for number in numbers]).sum()


def total_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, in float64, without waiting for the device."""
    if not tensors:
        return torch.zeros((), dtype=torch.float64)
    return total([norm.double().square() for norm in torch._foreach_norm(list(tensors))]).sqrt()


def read(numbers: Sequence[Tensor]) -> list[float]:
    """Bring 0-dimensional tensors to the host at once."""
    values: list[float] = torch.stack([number.double().to(numbers[0].device) for number in numbers]).tolist()
    return values
