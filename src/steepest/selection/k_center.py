"""k-center: samples that leave no other one far from all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from steepest._validation import check_integer
from steepest.selection.features import DEFAULT_MEMORY, FeatureRun, rescale_, unheard
from steepest.selection.method import Method, Scope
from steepest.selection.quotas import ClassPolicy, check_policy

__all__ = ["KCenter", "farthest_points"]


@dataclass(frozen=True)
class KCenter(Method):
    r"""Keep samples so that every other one has a kept one near, in the features of the last layer.

    The first sample of a group is the one nearest to the group's mean; each next one is the farthest from all taken:

    .. math:: \arg\max_i \min_{j\ \mathrm{taken}} \| h_i - h_j \|

    Its radius, the largest distance of a sample from the nearest kept one, is at most twice the smallest possible
    (Gonzalez 1985, Theoretical Computer Science 38); Sener and Savarese (arXiv 1708.00489) choose data for training
    by it. It is built to collect outliers, and with them wrong labels.

    One pass; N x H float32 numbers, and n distances per sample taken from a group of n. Nothing is random; ties go to
    the sample that comes first in the data. Scores: of the k samples kept of a group the first taken has k, the last
    1, all others 0. The report's ``radius`` is that of the group where it is largest.

    Args:
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.
        max_memory: Bytes that the features may take; a copy of those of the largest group comes on top.
        scope: Whose last layer gives the features, its inputs averaged over positions: "last", "all" or names of
            modules.

    Raises:
        InvalidOptionError: If an option has an impossible value.
    """

    name: ClassVar[str] = "k-center"

    class_policy: ClassPolicy = "auto"
    max_memory: int = DEFAULT_MEMORY
    scope: Scope = "last"

    def __post_init__(self) -> None:
        check_policy(self.class_policy)
        check_integer("max_memory", self.max_memory, low=1)

    def begin(self) -> FeatureRun:
        """Start a selection."""
        return FeatureRun(
            type(self).__name__, self.class_policy, self.max_memory, greedy=farthest_points, measure="radius"
        )


def farthest_points(features: Tensor, count: int, told: Callable[[int], None] = unheard) -> tuple[Tensor, float]:
    """Take ``count`` samples, each the farthest from those before it.

    Args:
        features: ``[n, H]``; overwritten.
        count: At most n.
        told: Called with how many are taken.

    Returns:
        Positions ``[count]`` in order of choice, and the radius.
    """
    exponent = rescale_(features)
    mean = features.mean(0, dtype=torch.float64).to(features.dtype)
    best = int(_distances(features, mean).argmin())
    nearest = torch.full((len(features),), torch.inf, dtype=features.dtype, device=features.device)
    order = torch.empty(count, dtype=torch.int64, device="cpu")
    for step in range(count):
        order[step] = best
        torch.minimum(nearest, _distances(features, features[best]), out=nearest)
        nearest[best] = -1  # below every distance: those that equal it come before it is taken twice
        best = int(nearest.argmax())
        told(step + 1)
    return order, max(0.0, float(nearest[best])) * 2.0**exponent


def _distances(features: Tensor, point: Tensor) -> Tensor:
    # From differences: |a|^2 - 2ab + |b|^2 would give equal samples a distance. It takes no temporary either.
    return torch.cdist(features, point.unsqueeze(0), compute_mode="donot_use_mm_for_euclid_dist").squeeze(1)
