"""Which sample belongs to which row, told from two backwards whose rows have different weights."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["owners_of", "probe"]


def probe(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two weightings of rows, by whose ratio, from 1 to 2, a row is known.

    Args:
        rows: ``[R]``.
        generator: Source of randomness, on the CPU.

    Returns:
        The weights, ``[R]`` each.
    """
    count = len(rows)
    # Random, so that several rows never look like another one; at least half of 1 / R apart, so that rounding does not
    # mix them up.
    place = torch.randperm(count, generator=generator) + torch.rand(count, generator=generator, dtype=torch.float64) / 2
    first = 1 + torch.rand(count, generator=generator, dtype=torch.float64)
    weights = torch.stack([first, first * (1 + place / count)]).to(rows)
    return weights[0], weights[1]


def owners_of(grads: Sequence[Tensor | None], others: Sequence[Tensor | None], ratios: Tensor) -> Tensor | None:
    """The row that every sample counts in.

    Args:
        grads: Gradients in every sample's own parameters, ``[B, *shape]`` each, rows weighted once.
        others: The same with the other weights.
        ratios: Of the weights, ``[R]``.

    Returns:
        Numbers of the rows, ``[B]``, any of samples that count nowhere; None where a sample counts in several rows,
        or where there are too many rows to be told apart.
    """
    pairs = [
        (a.reshape(len(a), -1), b.reshape(len(b), -1))
        for a, b in zip(grads, others, strict=True)
        if a is not None and b is not None
    ]
    tolerance = torch.finfo(pairs[0][0].dtype).eps ** 0.5
    if 8 * tolerance * len(ratios) > 1:
        return None
    squares = _sum([a.double().square().sum(1) for a, _ in pairs])
    products = _sum([(a * b).double().sum(1) for a, b in pairs])
    found = products / torch.where(squares > 0, squares, torch.ones_like(squares))
    ranked, order = ratios.double().sort()
    right = torch.searchsorted(ranked, found).clamp(max=len(ranked) - 1)
    left = (right - 1).clamp(min=0)
    nearer = torch.where((ranked[right] - found).abs() < (found - ranked[left]).abs(), right, left)
    owners = order[nearer]
    wanted = ratios[owners].unsqueeze(1)
    apart = _sum([(b - wanted * a).double().square().sum(1) for a, b in pairs])
    alone = apart <= tolerance**2 * squares
    return owners if bool(alone.all()) else None


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
