"""Places for labels that must not lie on each other."""

from collections.abc import Sequence

__all__ = ["spread_positions"]


def spread_positions(wanted: Sequence[float], *, gap: float) -> list[float]:
    """Move positions apart until neighbours are at least `gap` from each other.

    Labels that are too close form a group that is centred on the mean of what its members wanted.

    Args:
        wanted: Where each label would like to be.
        gap: Smallest distance between two labels.

    Returns:
        Where each goes, in the order given.

    Example:
        >>> spread_positions([0.5, 0.5], gap=0.1)
        [0.45, 0.55]
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    groups: list[list[int]] = [[index] for index in order]

    def middle(group: list[int]) -> float:
        return sum(wanted[index] for index in group) / len(group)

    position = 0
    while position + 1 < len(groups):
        left, right = groups[position], groups[position + 1]
        room = gap * (len(left) + len(right)) / 2
        if middle(right) - middle(left) < room - 1e-12:
            groups[position : position + 2] = [left + right]
            position = max(0, position - 1)
        else:
            position += 1
    places = [0.0] * len(wanted)
    for group in groups:
        for rank, index in enumerate(group):
            places[index] = middle(group) + gap * (rank - (len(group) - 1) / 2)
    return places
