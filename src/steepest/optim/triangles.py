"""Symmetric matrices as messages: one half of each, without gaps and without a table of indices."""

import torch
from torch import Tensor

__all__ = ["pack", "packed_size", "unpack"]


def packed_size(size: int) -> int:
    """How many numbers a symmetric matrix of this size has."""
    return size * (size + 1) // 2


def pack(matrix: Tensor) -> Tensor:
    r"""Fold the upper triangle of a symmetric matrix into a rectangle without gaps.

    .. math:: \begin{pmatrix} P & Q \\ Q^T & R \end{pmatrix} \to Q \text{ above } R\text{'s upper triangle, with }
        P\text{'s, transposed, in the hole below it}

    Args:
        matrix: ``[m, m]``.

    Returns:
        The numbers of the rectangle, ``[m (m + 1) / 2]``.

    Reference: the idea of LAPACK's rectangular full packed format (Gustavson et al., ACM TOMS 37, 2010).

    Example:
        >>> pack(torch.tensor([[1, 2, 3], [2, 4, 5], [3, 5, 6]]))
        tensor([2, 3, 4, 5, 1, 6])
    """
    size, top = len(matrix), len(matrix) // 2
    folded = matrix.new_zeros(_height(size), size - top)
    folded[:top] = matrix[:top, top:]
    folded[top:size] = matrix[top:, top:].triu()
    folded[top + 1 : 2 * top + 1, :top] += matrix[:top, :top].triu().T
    return folded.flatten()


def unpack(packed: Tensor, size: int) -> Tensor:
    """Make the whole matrix again.

    Args:
        packed: What `pack` returned, or a sum of such.
        size: m.

    Returns:
        ``[m, m]``, symmetric to the bit.

    Example:
        >>> unpack(torch.tensor([2, 1, 0]), 2)
        tensor([[0, 2],
                [2, 1]])
    """
    top = size // 2
    folded = packed.view(_height(size), size - top)
    matrix = folded.new_zeros(size, size)
    matrix[:top, top:] = folded[:top]
    matrix[top:, top:] = folded[top:size].triu()
    matrix[:top, :top] = folded[top + 1 : 2 * top + 1, :top].tril().T
    return torch.triu(matrix, 1).T + matrix


def _height(size: int) -> int:
    return size if size % 2 else size + 1
