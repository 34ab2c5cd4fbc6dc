"""Herding: samples whose running mean follows the mean of all features."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest._validation import check_integer
from steepest.linalg.factors import exact_dtype
from steepest.selection.features import DEFAULT_MEMORY, FeatureRun, rescale_, unheard
from steepest.selection.method import Method, Scope
from steepest.selection.quotas import ClassPolicy, check_policy

__all__ = ["Herding", "herd"]


@dataclass(frozen=True)
class Herding(Method):
    r"""Keep samples whose mean is the mean of all in the features of the last layer, one after another.

    In every group with mean :math:`\mu`, step t takes the sample not yet taken that brings the mean closest:

    .. math:: \arg\min_i \Big\| \mu - \tfrac1{t+1} \Big( \sum_{j\ \mathrm{taken}} h_j + h_i \Big) \Big\|

    This is the rule of iCaRL (arXiv 1611.07725), after Welling's herding (ICML 2009). Some released selection code
    takes the largest distance instead and collects outliers.

    One pass; N x H float32 numbers, and one product with a matrix ``[n, H]`` per sample taken from a group of n. Exact
    ties go to the sample that comes first in the data. Scores: of the k samples kept of a group the first taken has
    k, the last 1, all others 0. The report's ``mean_distance`` is the distance of the kept mean from the mean in the
    group where it is largest, over the root mean square distance of that group's samples from their mean.

    Args:
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.
        max_memory: Bytes that the features may take; a copy of those of the largest group comes on top.
        scope: Whose last layer gives the features, its inputs averaged over positions: "last", "all" or names of
            modules.

    Raises:
        InvalidOptionError: If an option has an impossible value.
    """

    name: ClassVar[str] = "herding"

    class_policy: ClassPolicy = "auto"
    max_memory: int = DEFAULT_MEMORY
    scope: Scope = "last"

    def __post_init__(self) -> None:
        check_policy(self.class_policy)
        check_integer("max_memory", self.max_memory, low=1)

    def begin(self) -> FeatureRun:
        """Start a selection."""
        return FeatureRun(type(self).__name__, self.class_policy, self.max_memory, greedy=herd, measure="mean_distance")


def herd(features: Tensor, count: int, told: Callable[[int], None] = unheard) -> tuple[Tensor, float]:
    """Take ``count`` samples whose mean follows the mean of all.

    Args:
        features: ``[n, H]``; overwritten.
        count: At most n.
        told: Called with how many are taken.

    Returns:
        Positions ``[count]`` in order of choice, and the distance of their mean from the mean of all over the root
        mean square distance of all from it (0 where all are equal).
    """
    # Only differences from the mean matter. They are small where features are not, so float32 holds them better.
    rescale_(features)
    features -= features.mean(0, dtype=torch.float64).to(features.dtype)
    rescale_(features)
    features = features.to(exact_dtype(features))
    rest = features.mean(0, dtype=torch.float64)  # what the rounding of the mean left
    # |sum + h - (t + 1) mu|^2 without what is the same for all; infinite for those that are taken.
    squares = features.square().sum(1)
    spread = math.sqrt(float(squares.double().mean()))
    drift = torch.zeros_like(rest)  # sum of the taken - t mu
    order = torch.empty(count, dtype=torch.int64, device="cpu")
    for step in range(count):
        direction = (drift - rest).to(features.dtype)
        best = int(torch.addmv(squares, features, direction, alpha=2).argmin())
        order[step] = best
        squares[best] = math.inf
        drift += features[best] - rest
        told(step + 1)
    return order, float(drift.norm()) / count / spread if spread else 0.0
