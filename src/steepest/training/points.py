"""Points of a rectangle, and splits of a problem made of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest.training.data import Split, Splits

__all__ = [
    "GRIDS",
    "SQUARE",
    "Block",
    "Box",
    "Function",
    "edge",
    "face",
    "grid",
    "problem",
    "sines",
    "sobol",
    "split_of",
]

Function = Callable[[Tensor], Tensor]
Box = tuple[tuple[float, float], ...]
SQUARE: Box = ((0.0, 1.0), (0.0, 1.0))
GRIDS = (50, 61)  # points along a side of the validation and of the test grid


@dataclass(frozen=True)
class Block:
    """Points of one condition.

    Attributes:
        kind: Number of the condition.
        points: `[N, d]`.
        data: `[N]`, or one number for all.
    """

    kind: int
    points: Tensor
    data: Tensor | float


def split_of(blocks: Sequence[Block], solution: Callable[[Tensor], Tensor]) -> Split:
    """Join the points of all conditions.

    Args:
        blocks: The points by condition.
        solution: The solution at points `[N, d]`, `[N]`.

    Returns:
        A split in float64.
    """
    targets = []
    for block in blocks:
        columns = torch.empty(len(block.points), 3, dtype=torch.float64)
        columns[:, 0], columns[:, 1], columns[:, 2] = block.kind, torch.as_tensor(block.data), solution(block.points)
        targets.append(columns)
    return Split(torch.cat([block.points for block in blocks]), torch.cat(targets))


def sobol(count: int, box: Box, seed: int) -> Tensor:
    """Points spread evenly over a box at random, another set for every seed."""
    drawn = torch.quasirandom.SobolEngine(len(box), scramble=True, seed=seed).draw(count, dtype=torch.float64)
    low, high = torch.tensor(box, dtype=torch.float64).unbind(1)
    return low + (high - low) * drawn


def _midpoints(count: int, low: float, high: float) -> Tensor:
    return low + (high - low) * (torch.arange(count, dtype=torch.float64) + 0.5) / count


def grid(count: int, box: Box) -> Tensor:
    """The midpoints of `count` equal parts of every side, `[count^d, d]`."""
    return torch.cartesian_prod(*(_midpoints(count, *side) for side in box)).view(-1, len(box))


def face(count: int, box: Box, axis: int, value: float) -> Tensor:
    """Points on the part of a rectangle's edge where one coordinate has a value."""
    along = _midpoints(count, *box[1 - axis])
    fixed = torch.full_like(along, value)
    return torch.stack([fixed, along] if axis == 0 else [along, fixed], 1)


def edge(count: int, box: Box) -> Tensor:
    """All four sides of a rectangle, `count` points on each."""
    return torch.cat([face(count, box, axis, value) for axis in (0, 1) for value in box[axis]])


def sines(*waves: float) -> Function:
    """Product of sin(w pi x) over the coordinates."""
    factors = math.pi * torch.tensor(waves, dtype=torch.float64)

    def product(points: Tensor) -> Tensor:
        return torch.sin(factors * points).prod(1)

    return product


def problem(
    points: int, side: int, box: Box, source: Function, others: Callable[[int], list[Block]], solution: Function
) -> Callable[[int], Splits]:
    """Splits of an equation with conditions on the edge: training points by Sobol, the others on two grids.

    Args:
        points: Training points of the equation.
        side: Training points along a side of the edge.
        box: Where the equation holds.
        source: Data of the equation, at points `[N, 2]`.
        others: All other conditions, given the number of points along a side.
        solution: The solution at points.

    Returns:
        A function from the data seed to the splits.
    """

    def load(data_seed: int) -> Splits:
        sets = [(sobol(points, box, data_seed), side), *((grid(count, box), count) for count in GRIDS)]
        return Splits(*(split_of([Block(0, where, source(where)), *others(along)], solution) for where, along in sets))

    return load
