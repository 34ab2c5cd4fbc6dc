"""Which samples of a group are kept, once each has a score."""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from steepest._validation import check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.selection.quotas import ClassPolicy, groups, quotas

__all__ = ["RandomAboveCut", "Rule", "Strata", "Top", "keep_by_group", "seeded"]


class Rule(ABC):
    """A way to choose by scores. The same scores give the same choice, on every machine."""

    def keep(self, scores: Tensor, count: int, *, group: int = 0) -> Tensor:
        """Choose ``count`` of the scored samples.

        Args:
            scores: ``[n]``, no NaN.
            count: How many, at most n.
            group: Number of the group, so that random choices differ between groups.

        Returns:
            ``[count]``, int64, ascending positions in ``scores``, on the CPU.

        Raises:
            InvalidOptionError: If there are fewer scores than ``count``, or some are NaN.
        """
        check_integer("count", count, low=0)
        if scores.ndim != 1 or count > len(scores):
            raise InvalidOptionError(
                f"Cannot keep {count} of scores of shape {tuple(scores.shape)}: give one score for each sample, and a "
                "count of at most as many."
            )
        missing = int(scores.isnan().sum())
        if missing:
            raise InvalidOptionError(f"{missing} of {len(scores)} scores are NaN: give every sample a number.")
        if not count:
            return torch.zeros(0, dtype=torch.int64, device="cpu")
        return self._choose(scores.detach().cpu(), count, group).sort().values

    @abstractmethod
    def _choose(self, scores: Tensor, count: int, group: int) -> Tensor:
        """Positions in any order; at least one is wanted."""


@dataclass(frozen=True)
class Top(Rule):
    """The highest scores; ties go to the smaller position.

    Example:
        >>> import torch
        >>> Top().keep(torch.tensor([0.1, 0.9, 0.5, 0.9]), 3)
        tensor([1, 2, 3])
    """

    def _choose(self, scores: Tensor, count: int, group: int) -> Tensor:
        del group
        return _ranked(scores)[:count]


@dataclass(frozen=True)
class Strata(Rule):
    """Drop low scores, then take evenly spaced ranks of what is left.

    With m scores left, the ranks are the midpoints of ``count`` equal strata: ``floor((j + 1/2) m / count)``. Where
    the tail holds wrong labels, they go; unlike the top alone, the rest keeps its variety.

    The default spread was chosen on Fashion-MNIST at 5, 15 and 25 % kept (`benchmarks/subsets.py`): it drops few
    samples where labels are clean, and most of the wrong ones where 20 % are. A fixed share of 20 % drops more of these
    and costs 2 to 3 points of accuracy on clean labels, where the tail is what is hard; a fixed floor says nothing of a
    scorer that was hardly trained, whose scores are all near 1.

    Args:
        tail_cut: Share of the group to drop, rounded down, in [0, 1); never so many that fewer than ``count`` are
            left.
        spread: Scores are cosines: drop those whose angle is more than this many times the group's median angle,
            where enough others are left. None drops none for that.

    Example:
        >>> import torch
        >>> Strata(tail_cut=0.2, spread=None).keep(torch.arange(10.0), 4)  # 0 and 1 are the tail
        tensor([2, 4, 6, 8])
        >>> Strata(spread=3.0).keep(torch.tensor([0.1, 0.99, 0.98, 0.97, 0.96]), 2)  # 84, 8, 11, 14, 16 degrees
        tensor([2, 4])
    """

    tail_cut: float = 0.0
    spread: float | None = 3.0

    def __post_init__(self) -> None:
        _check_tail(self.tail_cut, self.spread)

    def _choose(self, scores: Tensor, count: int, group: int) -> Tensor:
        del group
        left = _above_tail(scores, count, self.tail_cut, self.spread)
        ranks = (2 * torch.arange(count, device="cpu") + 1) * len(left) // (2 * count)
        return left[ranks]


@dataclass(frozen=True)
class RandomAboveCut(Rule):
    """Drop low scores, then choose at random among what is left.

    Args:
        tail_cut: Share of the group to drop, rounded down, in [0, 1); never so many that fewer than ``count`` are
            left.
        spread: As in `Strata`.
        seed: Of the choice; groups draw apart from each other.

    Example:
        >>> import torch
        >>> RandomAboveCut(tail_cut=0.5, spread=None, seed=1).keep(torch.arange(6.0), 3)  # as many as are left
        tensor([3, 4, 5])
    """

    tail_cut: float = 0.0
    spread: float | None = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check_tail(self.tail_cut, self.spread)
        check_integer("seed", self.seed, low=0)

    def _choose(self, scores: Tensor, count: int, group: int) -> Tensor:
        # Every position draws its turn, tail or not: a score that moves across the cut changes one choice, not all.
        turn = torch.randperm(len(scores), generator=seeded(self.seed, group), device="cpu")
        left = _above_tail(scores, count, self.tail_cut, self.spread)
        return left[turn[left].argsort()[:count]]


def keep_by_group(scores: Tensor, labels: Tensor | None, count: int, policy: ClassPolicy, rule: Rule) -> Tensor:
    """Choose in every group as many as its quota says.

    Args:
        scores: ``[N]``, no NaN.
        labels: ``[N]``, whole numbers, or None.
        count: How many to keep in all.
        policy: Class policy.
        rule: How to choose within a group.

    Returns:
        ``[count]``, int64, ascending positions, on the CPU.
    """
    share = quotas(labels, count, policy)
    members = groups(labels, policy, len(scores))
    kept = [positions[rule.keep(scores[positions], share[g], group=g)] for g, positions in members.items()]
    return torch.cat(kept).sort().values


def seeded(seed: int, group: int) -> torch.Generator:
    """A generator on the CPU whose stream belongs to one group.

    Args:
        seed: The user's seed.
        group: Number of the group.

    Returns:
        The generator; streams of different seeds and groups are unrelated.
    """
    digest = hashlib.sha256(f"{seed}/{group}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def _ranked(scores: Tensor) -> Tensor:
    """Positions from the highest score to the lowest, ties by position."""
    return torch.argsort(scores, descending=True, stable=True)


def _check_tail(tail_cut: float, spread: float | None) -> None:
    check_real("tail_cut", tail_cut, low=0.0, high=1.0, open_high=True)
    if spread is not None:
        check_real("spread", spread, low=1.0)


def _above_tail(scores: Tensor, count: int, tail_cut: float, spread: float | None) -> Tensor:
    """The same without the lowest share, and without the angles that are far beyond the median."""
    total = len(scores)
    dropped = int(tail_cut * total + 1e-9)  # 0.29 * 100 is 28.999999999999996
    if spread is not None:
        angles = scores.double().clamp(-1, 1).arccos()
        dropped = max(dropped, int((angles > spread * angles.median()).sum()))
    return _ranked(scores)[: max(count, total - dropped)]
