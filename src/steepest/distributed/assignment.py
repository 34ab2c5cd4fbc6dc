"""Which process does which part of the work."""

from collections.abc import Sequence

from steepest._validation import check_integer

__all__ = ["assign_by_cost"]


def assign_by_cost(costs: Sequence[float], ranks: int) -> list[int]:
    """Give each piece of work to a rank, the most costly first and each to the rank that has least to do.

    The same on every rank, since it depends on the arguments alone. The busiest rank has at most 4/3 of the best
    possible load.

    Args:
        costs: Of the pieces.
        ranks: Number of ranks.

    Returns:
        The rank of every piece.

    Reference: Graham, Bounds on multiprocessing timing anomalies, 1969 (largest processing time first).

    Example:
        >>> assign_by_cost([5.0, 1.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
    """
    check_integer("ranks", ranks, low=1)
    loads, owners = [0.0] * ranks, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owner = min(range(ranks), key=lambda rank: (loads[rank], rank))
        owners[piece] = owner
        loads[owner] += costs[piece]
    return owners
