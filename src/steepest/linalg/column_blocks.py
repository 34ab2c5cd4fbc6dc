"""Products in float64 of a float32 matrix that lies in blocks of columns, with no copy of more than a piece of it."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from steepest.linalg.outer import add_outer, mirror_upper

__all__ = ["gram", "multiply", "squared_norm"]

CHUNK_BYTES = 1 << 22


def squared_norm(blocks: Iterable[Tensor]) -> float:
    """Return the sum of the squares of all numbers as float32 holds them; float64 holds the square of any of them."""
    total: Tensor | float = 0.0
    for block in blocks:
        for part in block.split(256):  # of many rows at once, a few columns lie far apart
            for columns in _chunks(*part.shape):
                total = total + part[:, columns].float().double().square().sum()
    return float(total)


def gram(blocks: Iterable[Tensor], rows: int) -> Tensor:
    """Return ``B B^T`` of the first rows.

    Args:
        blocks: The columns of B, at least one block ``[>= rows, numel]``.
        rows: How many rows count.

    Returns:
        ``[rows, rows]`` in float64, on the device of the first block.
    """
    total: Tensor | None = None
    for block in blocks:
        if total is None:
            total = torch.zeros(rows, rows, dtype=torch.float64, device=block.device)
        for columns in _chunks(rows, block.shape[1]):
            add_outer(total, block[:rows, columns].to(total))
    if total is None:
        return torch.zeros(rows, rows, dtype=torch.float64, device="cpu")
    mirror_upper(total)
    return total


def multiply(weights: Tensor, block: Tensor, out: Tensor) -> None:
    """Put ``weights @ block`` in the first rows of ``out``, which may be the block itself.

    Args:
        weights: ``[k, rows]`` in float64.
        block: ``[>= rows, numel]``, whose first rows count.
        out: ``[>= k, numel]``.
    """
    count, rows = weights.shape
    weights = weights.to(block.device)
    for columns in _chunks(rows, block.shape[1]):
        # In float64 neither autocast nor TF32 rounds the products.
        out[:count, columns] = weights @ block[:rows, columns].double()


def _chunks(rows: int, columns: int) -> Iterator[slice]:
    """Pieces of the columns whose float64 copies stay in the cache."""
    width = max(1, CHUNK_BYTES // (8 * max(1, rows)))
    for start in range(0, columns, width):
        yield slice(start, min(start + width, columns))
