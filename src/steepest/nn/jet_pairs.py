"""Which second derivatives are computed, as pairs of inputs."""

from collections.abc import Sequence
from typing import Literal

from steepest._validation import check_choice
from steepest.errors import InvalidOptionError

__all__ = ["Pairs", "Second", "wanted_pairs"]

Pairs = tuple[tuple[int, int], ...]
Second = Literal["diagonal", "all"] | Sequence[tuple[int, int]]


def wanted_pairs(d: int, order: int, second: Second) -> Pairs:
    """Pairs of inputs along which second derivatives are computed.

    Args:
        d: Number of inputs.
        order: Highest derivative, 1 or 2.
        second: "diagonal", "all" or pairs.

    Returns:
        Pairs (i, j) with i <= j; none for order 1.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> wanted_pairs(2, 2, "all")
        ((0, 0), (0, 1), (1, 1))
    """
    if order not in {1, 2}:
        raise InvalidOptionError(
            f"order={order}: first and second derivatives are computed, so give 1 or 2. For higher ones call "
            "torch.autograd.grad with create_graph=True in the closure, and give the optimizer "
            "capture=BatchedCapture(model)."
        )
    if order == 1:
        return ()
    if isinstance(second, str):
        check_choice("second", second, ("diagonal", "all"))
        return tuple((i, j) for i in range(d) for j in range(i, d if second == "all" else i + 1))
    pairs = tuple((min(pair), max(pair)) for pair in second)
    if not pairs or len(set(pairs)) < len(pairs) or not all(0 <= i <= j < d for i, j in pairs):
        raise InvalidOptionError(
            f"second={second!r} with {d} inputs: give 'diagonal', 'all', or different pairs of inputs from 0 to {d - 1}"
            ", as in [(0, 0)]."
        )
    return pairs
