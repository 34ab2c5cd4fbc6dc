"""Where the rows of the Jacobian lie in a captured tensor, found by a probe instead of assumed.

A captured tensor has leading dimensions (batch, positions, in any order) and feature dimensions. Which of the
leading ones carries the rows is a property of the model: dimension 0 almost always, dimension 1 inside
`torch.nn.MultiheadAttention`, merged with the positions after a ``view(B * T, D)``.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Layout", "agrees", "candidates", "is_silent"]


@dataclass(frozen=True)
class Layout:
    """One way to read the leading dimensions as ``[rows, shared]``.

    Args:
        dim: The leading dimension that carries the rows.
        merged: How many entries of that dimension belong to one row (1: none merged).
        shared_major: Whether merged entries are ordered position-first (row index fastest).
    """

    dim: int = 0
    merged: int = 1
    shared_major: bool = False

    def split(self, tensor: Tensor) -> Tensor:
        """Bring the rows to the front.

        Args:
            tensor: Any tensor with this layout, ``[..., rows * merged at dim, ...]``.

        Returns:
            The same entries as ``[rows, merged, the other dimensions in their order]``.
        """
        moved = tensor.movedim(self.dim, 0)
        if self.shared_major:
            return moved.reshape(self.merged, -1, *moved.shape[1:]).transpose(0, 1)
        return moved.reshape(-1, self.merged, *moved.shape[1:])

    def canonical(self, tensor: Tensor, num_lead: int) -> Tensor:
        """Flatten to the engine's one layout.

        Args:
            tensor: Tensor with ``num_lead`` leading dimensions, then features.
            num_lead: How many dimensions come before the features.

        Returns:
            The same entries as ``[rows, shared, features...]``.
        """
        if self.dim == 0 and self.merged == 1:  # by far the most common: a view without a copy
            return tensor.unsqueeze(1) if num_lead == 1 else tensor.flatten(1, num_lead - 1)
        return self.split(tensor).flatten(1, num_lead)


def candidates(lead: tuple[int, ...], rows: int) -> Iterator[Layout]:
    """List the layouts that the sizes allow, the likeliest first.

    Args:
        lead: Sizes of the leading dimensions.
        rows: Number of rows of the Jacobian.

    Yields:
        Each possible layout.
    """
    for dim, size in enumerate(lead):
        if size == rows:
            yield Layout(dim)
    for dim, size in enumerate(lead):
        if 0 < rows < size and size % rows == 0:
            yield Layout(dim, size // rows)
            if rows > 1:
                yield Layout(dim, size // rows, shared_major=True)


def agrees(layout: Layout, full: Tensor, probe: Tensor, weights: Tensor, tolerance: Tensor) -> bool:
    """Tell whether row n of an output gradient depends on row n of the losses alone, read in a layout.

    Then the gradient of ``sum_n w_n r_n`` is row by row ``w_n`` times that of ``sum_n r_n``. The zeros among the
    weights tell even weak interaction exactly; the others differ from row to row.

    Args:
        layout: The layout.
        full: Gradient of the sum of all rows.
        probe: Gradient of the weighted sum.
        weights: ``[rows]``, some of them zero.
        tolerance: Difference that rounding explains.

    Returns:
        Whether the gradients are as they must be.
    """
    whole, part = layout.split(full).flatten(1), layout.split(probe).flatten(1)
    expected = whole * weights.to(whole.dtype).unsqueeze(1)
    return not part[weights == 0].any() and bool((part - expected).abs().amax() <= tolerance)


def is_silent(layout: Layout, full: Tensor, weights: Tensor) -> bool:
    """Whether the rows that a probe leaves out have no gradient anyway, so that it proves nothing."""
    return not layout.split(full)[weights == 0].any()
