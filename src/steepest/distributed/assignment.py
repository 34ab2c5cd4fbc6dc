"""Which process does which part of the work."""

from collections.abc import Sequence

from steepest._validation import check_integer

__all__ = ["assign_by_cost"]


def assign_by_cost(costs: Sequence[float], ranks: int, team: int = 1) -> list[int]:
    """Give each piece of work to a rank, the most costly first and each to the rank that has least to do.

    The same on every rank, since it depends on the arguments alone. The busiest rank has at most 4/3 of the best
    possible load. Where ranks work in teams, which have their members' pieces in common, a piece goes in this way to a
    team, and then to one of its ranks.

    Args:
        costs: Of the pieces.
        ranks: Number of ranks.
        team: How many ranks next to each other are a team; a divisor of their number.

    Returns:
        The rank of every piece.

    Reference: Graham, Bounds on multiprocessing timing anomalies, 1969 (largest processing time first).

    Example:
        >>> assign_by_cost([5.0, 1.0, 3.0, 3.0], 2)
        [0, 0, 1, 1]
        >>> assign_by_cost([5.0, 4.0, 2.0], 4, team=2)
        [0, 2, 3]
    """
    check_integer("ranks", ranks, low=1)
    teams = _least_loaded(costs, ranks // team)
    owners = [0] * len(costs)
    for number in range(ranks // team):
        pieces = [piece for piece, its in enumerate(teams) if its == number]
        for piece, member in zip(pieces, _least_loaded([costs[piece] for piece in pieces], team), strict=True):
            owners[piece] = number * team + member
    return owners


def _least_loaded(costs: Sequence[float], workers: int) -> list[int]:
    loads, found = [0.0] * workers, [0] * len(costs)
    for piece in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        found[piece] = min(range(workers), key=lambda worker: (loads[worker], worker))
        loads[found[piece]] += costs[piece]
    return found
