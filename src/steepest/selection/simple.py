"""The methods that every other must beat: at random, and by the size of a sample's gradient."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from steepest._validation import check_choice, check_integer
from steepest.errors import InvalidOptionError
from steepest.selection.method import Method, Picked, Rows, Run, Scope
from steepest.selection.quotas import ALL, ClassPolicy, check_policy, groups
from steepest.selection.rules import seeded
from steepest.selection.scores import ErrorRun, GradientRun, Keep, ScoreRun, checked_quotas

__all__ = ["EL2N", "GraNd", "Random"]


@dataclass(frozen=True)
class Random(Method):
    """Choose at random: the method to beat, and hard to beat where at most a third of clean data is kept.

    No pass over gradients and no model. All samples are brought into one random order, and every class keeps its
    first ones: with one seed a larger subset holds the smaller ones (while no class runs out), and the choice is the
    same on every machine and device. All weights are 1.

    Args:
        seed: Seed of a generator of its own; torch's global one is not touched.
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.

    Raises:
        InvalidOptionError: If an option has an impossible value.

    Example:
        >>> import torch
        >>> run = Random(seed=1).begin()
        >>> picked = run.pick(4, torch.tensor([0, 0, 0, 0, 1, 1, 2, 2]))
        >>> len(picked.indices), picked.weights.tolist()
        (4, [1.0, 1.0, 1.0, 1.0])
    """

    name: ClassVar[str] = "random"
    scope = "last"  # no field: nothing is differentiated

    seed: int = 0
    class_policy: ClassPolicy = "auto"

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, low=0)
        check_policy(self.class_policy)

    def begin(self) -> "RandomRun":
        """Start a selection."""
        return RandomRun(self.seed, self.class_policy)


class RandomRun(Run):
    """A random choice under way: it has nothing to learn but how many samples there are.

    Args:
        seed: Seed of the order.
        class_policy: Class policy.
    """

    merges = True

    def __init__(self, seed: int, class_policy: ClassPolicy) -> None:
        self.passes = 0
        self._seed, self._policy = seed, class_policy
        self._num_samples: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return 0

    def expect(self, num_samples: int) -> None:
        """Say how many samples there are, which nothing else says of data without labels."""
        self._num_samples = num_samples

    def update(self, number: int, rows: Rows) -> None:
        """Count the samples, where a driver shows them all the same."""
        del number
        self._num_samples = int(rows.indices[-1]) + 1

    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Choose at random in every group.

        Args:
            count: How many samples.
            labels: ``[N]`` or None.

        Returns:
            The choice, without scores.

        Raises:
            InvalidOptionError: If nothing has told how many samples there are.
        """
        total = self._num_samples if labels is None else len(labels)
        if total is None:
            raise InvalidOptionError("Random was not told how many samples there are: call expect() or give labels.")
        # A stream of its own: whoever shuffled the data by a generator of the same seed has another permutation.
        order = torch.randperm(total, generator=seeded(self._seed, ALL), device="cpu")
        rank = order.argsort()
        members = groups(labels, self._policy, total)
        kept = [
            members[key][rank[members[key]].argsort()[:quota]]
            for key, quota in checked_quotas(labels, count, self._policy, total).items()
        ]
        return Picked(torch.cat(kept).sort().values, None, torch.ones(count, dtype=torch.float32, device="cpu"))

    def state_dict(self) -> dict[str, Any]:
        """How many samples there are."""
        return {"num_samples": self._num_samples}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self._num_samples = state["num_samples"]


@dataclass(frozen=True)
class EL2N(Method):
    r"""Choose by the size of the error in the model's outputs (arXiv 2107.07075).

    The score of a sample is the norm of its loss's gradient in the outputs of the last layer,

    .. math:: s_n = \|\nabla_z \ell_n\|_2,

    which for cross-entropy is :math:`\|p_n - y_n\|`, softmax minus one-hot. Where the last layer has several positions
    (a convolution, a sequence) it is the norm over all of them. The paper keeps the highest scores, averages them over
    some ten networks, and disregards classes, as ``class_policy="global"`` does; here the one model given scores.

    High scores are hard samples, and wrong labels are the hardest of all: on data with wrong labels, or where little is
    kept, keeping the top does worse than choosing at random. One pass; N numbers of memory.

    Args:
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.
        keep: "top" keeps the highest scores, "bottom" the lowest; ties go to the sample that comes first.

    Raises:
        InvalidOptionError: If an option has an impossible value.

    Example:
        >>> EL2N(keep="bottom")
        EL2N(class_policy='auto', keep='bottom')
    """

    name: ClassVar[str] = "el2n"
    scope = "last"  # no field: it is what the score is made of

    class_policy: ClassPolicy = "auto"
    keep: Keep = "top"

    def __post_init__(self) -> None:
        _check(self.class_policy, self.keep)

    def begin(self) -> ScoreRun:
        """Start a selection."""
        return ErrorRun(self.class_policy, self.keep)


@dataclass(frozen=True)
class GraNd(Method):
    r"""Choose by the norm of the gradient (arXiv 2107.07075).

    The score of a sample is

    .. math:: s_n = \|\nabla_\theta \ell_n\|_2

    in the parameters of the scope. The paper takes all parameters, at the very beginning of training, and the mean
    over some ten networks; here the one model given scores. As with `EL2N`, the highest scores collect wrong labels.
    One pass; N numbers of memory.

    Args:
        scope: "last" (the last layer), "all", or names of modules.
        class_policy: "auto" is "balanced" where labels exist, else "global"; see `quotas`.
        keep: "top" keeps the highest scores, "bottom" the lowest; ties go to the sample that comes first.

    Raises:
        InvalidOptionError: If an option has an impossible value.

    Example:
        >>> GraNd(scope="all")
        GraNd(scope='all', class_policy='auto', keep='top')
    """

    name: ClassVar[str] = "grand"

    scope: Scope = "last"
    class_policy: ClassPolicy = "auto"
    keep: Keep = "top"

    def __post_init__(self) -> None:
        _check(self.class_policy, self.keep)

    def begin(self) -> ScoreRun:
        """Start a selection."""
        return GradientRun(self.class_policy, self.keep)


def _check(class_policy: str, keep: str) -> None:
    check_policy(class_policy)
    check_choice("keep", keep, ("top", "bottom"))
