"""Products of a matrix with its own transpose: only the upper block triangle is formed where that pays."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from steepest.linalg.factors import exact_dtype

__all__ = ["MeanOuter", "add_outer", "mirror_upper", "outer"]


class MeanOuter:
    """Mean of ``x x^T`` over columns that come piece by piece, in full precision whatever autocast and TF32 say.

    Args:
        count: How many terms it is the mean of; the mean of nothing is NaN.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._total: Tensor | None = None
        self._dtype = torch.float32

    def add(self, columns: Tensor) -> None:
        """Add some columns ``[R, columns]``."""
        keep = self._total is not None
        if self._total is None:
            self._dtype, size = columns.dtype, len(columns)
            self._total = columns.new_empty(size, size, dtype=exact_dtype(columns))
        add_outer(self._total, columns.to(self._total.dtype), scale=1 / max(self._count, 1), keep=keep)

    def value(self) -> Tensor:
        """The mean.

        Returns:
            ``[R, R]``, symmetric up to rounding, in the columns' own dtype.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._total is None:
            raise RuntimeError("nothing was added")
        mirror_upper(self._total)
        return (self._total if self._count else self._total.fill_(math.nan)).to(self._dtype)


def outer(matrix: Tensor) -> Tensor:
    """Return ``matrix @ matrix.T``, symmetric up to rounding.

    Args:
        matrix: ``[R, columns]``.

    Returns:
        ``[R, R]``.
    """
    if not _halving_pays(*matrix.shape):
        return matrix @ matrix.T
    total = matrix.new_empty(len(matrix), len(matrix))
    add_outer(total, matrix, keep=False)
    mirror_upper(total)
    return total


def add_outer(total: Tensor, matrix: Tensor, *, scale: float = 1.0, keep: bool = True) -> None:
    """Add ``scale * matrix @ matrix.T`` to the blocks on and above the diagonal; the others are left undefined.

    A sum of several products needs one `mirror_upper` at its end.

    Args:
        total: ``[R, R]``, changed in place.
        matrix: ``[R, columns]``, of the same dtype.
        scale: Factor of the product.
        keep: Whether to add to what is there, else to overwrite it.
    """
    # Autocast does not reach products in place: these are formed in the precision of the operands.
    rows, columns = matrix.shape
    if not _halving_pays(rows, columns):
        total.addmm_(matrix, matrix.T, beta=keep, alpha=scale)
        return
    for start, stop in _blocks(rows):
        total[start:stop, start:].addmm_(matrix[start:stop], matrix[start:].T, beta=keep, alpha=scale)


def mirror_upper(total: Tensor) -> None:
    """Fill the blocks below the diagonal of a sum of `add_outer` in place, from those above.

    Both halves of a block on the diagonal were formed, and are as symmetric as the device's products are: to make
    them exactly so costs more than all else here where columns are few, and `symmetrised` does it when it matters.

    Args:
        total: ``[R, R]``.
    """
    for start, stop in _blocks(len(total)):
        if stop < len(total):
            total[stop:, start:stop] = total[start:stop, stop:].T


def _blocks(rows: int) -> Iterator[tuple[int, int]]:
    """First and last row of the blocks; more of them leave out more, and thin blocks multiply slowly."""
    count = 1 if rows < 128 else 4 if rows < 1024 else 8
    step = max(1, -(-rows // count))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def _halving_pays(rows: int, columns: int) -> bool:
    """Whether a product is large enough that leaving out its lower blocks saves time."""
    return rows >= 128 and rows * rows * columns >= 1 << 24
