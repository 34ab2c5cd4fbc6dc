"""Ranks in teams of one size: messages within a team, and between those that have the same place in every team."""

import functools
from dataclasses import dataclass
from typing import Any, Self
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

from steepest._validation import check_integer, check_real
from steepest.distributed.contact import contact
from steepest.distributed.ranks import Ranks

__all__ = ["Teams", "team_size"]

# By process group and size of the teams; a communicator is dear, so those of optimizers that come later are shared.
_made: WeakKeyDictionary[Any, dict[int, list[Any]]] = WeakKeyDictionary()


@functools.cache
def team_size(fraction: float, ranks: int) -> int:
    """How many ranks are in a team that should have a fraction of all: the nearest size that divides their number.

    Args:
        fraction: Of all ranks, above 0 and at most 1.
        ranks: Number of ranks.

    Returns:
        A divisor; of two that are as near, the larger.

    Example:
        >>> [team_size(0.5, ranks) for ranks in (1, 2, 3, 4, 8, 9)]
        [1, 1, 1, 2, 4, 3]
    """
    check_real("fraction", fraction, low=0, high=1, open_low=True)
    check_integer("ranks", ranks, low=1)
    sizes = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return min(sizes, key=lambda size: (abs(size - fraction * ranks), -size))


@dataclass(frozen=True, eq=False)
class Teams:
    """Where one rank stands: of six ranks in teams of three, 0 1 2 and 3 4 5, the pairs 0 3, 1 4 and 2 5 are across.

    Args:
        inside: Its team; None where it is alone in it.
        across: The ranks with its place in every team, in the order of the teams; None where there is one team.
    """

    inside: Ranks | None
    across: Ranks | None

    @classmethod
    def of(cls, ranks: Ranks, size: int, device: torch.device) -> Self:
        """Divide ranks into teams. Every rank must come here, and the first time for a size all wait for each other.

        Args:
            ranks: The ranks; messages of the teams are counted in their traffic.
            size: Of a team, a divisor of their number.
            device: Where messages come from.

        Returns:
            This rank's place.
        """
        if size == ranks.size:
            return cls(ranks, None)
        if size == 1:
            return cls(None, ranks)
        whole = dist.group.WORLD if ranks.group is None else ranks.group
        groups = _made.setdefault(whole, {})
        if size not in groups:
            start, place = ranks.rank - ranks.rank % size, ranks.rank % size
            # Each rank founds its team first, and no rank waits for one that waits for it.
            members = range(start, start + size), range(place, ranks.size, size)
            groups[size] = [_founded(ranks, [*numbers], device) for numbers in members]
        inside, across = (type(ranks)(group, ranks.traffic) for group in groups[size])
        return cls(inside, across)


def _founded(ranks: Ranks, numbers: list[int], device: torch.device) -> Any:
    """A process group of some of the ranks, that waits no longer than the group of all does."""
    whole: Any = dist.group.WORLD if ranks.group is None else ranks.group
    members = numbers if ranks.group is None else [dist.get_global_rank(ranks.group, number) for number in numbers]
    with contact():
        # torch gives a new group its default of many minutes, whatever the first one has, and has no way to ask.
        options = getattr(whole._get_backend(device), "options", None)
        return dist.new_group(members, timeout=getattr(options, "_timeout", None), use_local_synchronization=True)
