"""How many samples every class may keep: whole numbers whose sum is exactly what was asked for."""

from typing import Literal

import torch
from torch import Tensor

from steepest._validation import check_choice, check_integer
from steepest.errors import InvalidOptionError

__all__ = ["ALL", "ClassPolicy", "check_policy", "class_weights", "groups", "quotas", "settled"]

ClassPolicy = Literal["auto", "global", "balanced", "proportional"]

POLICIES = ("auto", "global", "balanced", "proportional")
ALL = -1  # the one group of the policy "global"


def check_policy(policy: str) -> None:
    """Refuse a class policy that does not exist."""
    check_choice("class_policy", policy, POLICIES)


def settled(policy: ClassPolicy, labels: Tensor | None) -> Literal["global", "balanced", "proportional"]:
    """Say which policy "auto" stands for, and refuse one that needs labels where there are none.

    Args:
        policy: As the user gave it.
        labels: ``[N]``, whole numbers, or None.

    Returns:
        "balanced" for "auto" where labels exist, "global" where they do not; any other policy as it is.

    Raises:
        InvalidOptionError: If the policy does not exist, or needs labels that are not there or no whole numbers.
    """
    check_policy(policy)
    if labels is not None and (labels.ndim != 1 or labels.is_floating_point() or labels.is_complex()):
        raise InvalidOptionError(
            f"Labels have shape {tuple(labels.shape)} and dtype {labels.dtype}: give one whole number per sample."
        )
    if policy == "auto":
        return "global" if labels is None else "balanced"
    if labels is None and policy != "global":
        raise InvalidOptionError(
            f"class_policy={policy!r} needs the class of every sample, and the data has no whole-number labels: give "
            'labels=, one whole number per sample, or class_policy="global".'
        )
    return policy


def groups(labels: Tensor | None, policy: ClassPolicy, num_samples: int | None = None) -> dict[int, Tensor]:
    """Split the samples into the groups of a policy.

    Args:
        labels: ``[N]``, whole numbers, or None.
        policy: Class policy.
        num_samples: N; needed where there are no labels.

    Returns:
        Ascending positions, int64 on the CPU, by class in ascending order; ``{-1: all}`` for "global".

    Raises:
        InvalidOptionError: If the policy does not exist or needs labels, or N is not known.
    """
    if settled(policy, labels) == "global" or labels is None:
        total = num_samples if labels is None else len(labels)
        if total is None:
            raise InvalidOptionError("groups() has no labels: give num_samples, the number of samples.")
        return {ALL: torch.arange(total, device="cpu")}
    labels = labels.cpu().long()
    order = torch.argsort(labels, stable=True)  # one sort, not one comparison of all labels per class
    classes, sizes = torch.unique_consecutive(labels[order], return_counts=True)
    return dict(zip(classes.tolist(), order.split(sizes.tolist()), strict=True))


def quotas(labels: Tensor | None, count: int, policy: ClassPolicy) -> dict[int, int]:
    """Divide ``count`` samples among the classes.

    Nothing is rounded away: the quotas sum to ``count``. No class gets more than it has; what a small class cannot
    take goes to the classes that still have room.

    Args:
        labels: ``[N]``, whole numbers, or None.
        count: How many samples to keep.
        policy: "balanced": the same for every class; "proportional": each class its share of the data, the largest
            remainder rounded up; "global": classes do not matter; "auto": "balanced" where labels exist, else
            "global". Ties go to the smaller class number.

    Returns:
        How many to keep by class in ascending order; ``{-1: count}`` for "global". A class may get none.

    Raises:
        InvalidOptionError: If ``count`` exceeds the number of samples, or the policy does not exist or needs labels.

    Example:
        >>> import torch
        >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1, 2])
        >>> quotas(labels, 7, "balanced")
        {0: 3, 1: 3, 2: 1}
        >>> quotas(labels, 7, "proportional")
        {0: 4, 1: 2, 2: 1}
    """
    chosen = settled(policy, labels)
    check_integer("count", count, low=0)
    if labels is not None and count > len(labels):
        raise InvalidOptionError(f"count={count}: there are only {len(labels)} samples. Give a smaller count.")
    if chosen == "global" or labels is None:
        return {ALL: count}
    classes, sizes = torch.unique(labels.cpu().long(), return_counts=True)
    have = dict(zip(classes.tolist(), sizes.tolist(), strict=True))
    return _balanced(have, count) if chosen == "balanced" else _proportional(have, count)


def class_weights(indices: Tensor, labels: Tensor) -> Tensor:
    """Weights that give every kept class its share of the data back.

    Args:
        indices: ``[k]``, the kept samples.
        labels: ``[N]``, whole numbers.

    Returns:
        ``[k]``, float32: size of the sample's class over how many of it are kept, divided by the mean of all.
    """
    _, places, sizes = torch.unique(labels.cpu().long(), return_inverse=True, return_counts=True)
    kept = places[indices]
    raw: Tensor = sizes[kept].double() / torch.bincount(kept, minlength=len(sizes))[kept]
    return (raw / raw.mean()).float()


def _balanced(have: dict[int, int], count: int) -> dict[int, int]:
    """Give every class with room the same, until nothing is left."""
    given = dict.fromkeys(have, 0)
    while count:
        room = [label for label in have if given[label] < have[label]]
        share = max(1, count // len(room))  # the last few go one each, smaller class numbers first
        for label in room:
            more = min(share, have[label] - given[label], count)
            given[label] += more
            count -= more
    return given


def _proportional(have: dict[int, int], count: int) -> dict[int, int]:
    """Largest remainder in whole numbers; a share rounded up is never more than the class has."""
    total = sum(have.values())
    given = {label: count * size // total for label, size in have.items()}
    by_remainder = sorted(have, key=lambda label: (-(count * have[label] % total), label))
    for label in by_remainder[: count - sum(given.values())]:
        given[label] += 1
    return given
