"""One number for every sample, and the choice of one end of them in every class."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from steepest.errors import InvalidOptionError, NonFiniteError
from steepest.selection.column import Column
from steepest.selection.method import Picked, Rows, Run
from steepest.selection.quotas import ClassPolicy, groups, quotas, settled

if TYPE_CHECKING:
    from steepest.selection.together import Together

__all__ = ["ErrorRun", "GradientRun", "Keep", "ScoreRun", "checked_quotas"]

Keep = Literal["top", "bottom"]


class ScoreRun(Run):
    """A run that keeps one number for every sample in one pass.

    Args:
        class_policy: Class policy.
        keep: Which end of the scores to keep.
    """

    merges = True

    def __init__(self, class_policy: ClassPolicy, keep: Keep) -> None:
        self.passes = 1
        self._policy, self._keep = class_policy, keep
        self._scores = Column(torch.float32)

    @property
    def nbytes(self) -> int:
        """Bytes that the state holds."""
        return self._scores.nbytes

    @abstractmethod
    def score(self, rows: Rows) -> Tensor:
        """Score the samples of a batch, ``[B]``."""

    def update(self, number: int, rows: Rows) -> None:
        """Score the next batch.

        Args:
            number: Always 0.
            rows: The batch.

        Raises:
            InvalidOptionError: If the policy needs labels that are not there.
            NonFiniteError: If the gradient of a sample is not finite.
        """
        del number
        settled(self._policy, rows.labels)  # refuses before hours of work, not after them
        scores = self.score(rows).detach().to("cpu", torch.float32)
        bad = ~scores.isfinite()
        if bad.any():
            raise NonFiniteError(
                f"The gradient of sample {int(rows.indices[bad][0])} is not finite or too large for float32: remove "
                "or mend that sample, or look at the model's weights."
            )
        self._scores.add(scores)

    def join(self, number: int, together: "Together") -> None:
        """Bring the scores of all processes together.

        Args:
            number: Always 0.
            together: The processes.
        """
        del number
        scores = together.in_order(self._scores.tensor())
        self._scores = Column(torch.float32)
        self._scores.add(scores)

    def pick(self, count: int, labels: Tensor | None) -> Picked:
        """Keep one end of the scores in every group.

        Args:
            count: How many samples.
            labels: ``[N]`` or None.

        Returns:
            The choice and all scores.
        """
        scores = self._scores.tensor()
        members = groups(labels, self._policy, len(scores))
        kept = []
        for key, quota in checked_quotas(labels, count, self._policy, len(scores)).items():
            order = scores[members[key]].sort(descending=self._keep == "top", stable=True).indices
            kept.append(members[key][order[:quota]])
        indices = torch.cat(kept).sort().values
        numbers = {"mean_score_kept": float(scores[indices].mean()), "mean_score": float(scores.mean())}
        return Picked(indices, scores, torch.ones(count, dtype=torch.float32, device="cpu"), numbers=numbers)

    def state_dict(self) -> dict[str, Any]:
        """The scores so far."""
        return {"scores": self._scores.tensor()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go back to a state."""
        self.resume(0, {}, [(state, state["scores"])])

    def resume(
        self, number: int, common: Mapping[str, Any], shares: Sequence[tuple[Mapping[str, Any], Tensor]]
    ) -> None:
        """Go on with the scores of some processes, one after the other as their samples are."""
        del number, common
        self._scores = Column(torch.float32)
        for state, _ in shares:
            self._scores.add(state["scores"])


class ErrorRun(ScoreRun):
    """Scores of `EL2N`."""

    def score(self, rows: Rows) -> Tensor:
        """Norms in the last layer's outputs, in float64: squares of float32 numbers may overflow."""
        _, grads = rows.jacobian.layer_rows(rows.last)
        norms: Tensor = torch.linalg.vector_norm(grads.flatten(1), dim=1, dtype=torch.float64)
        return norms


class GradientRun(ScoreRun):
    """Scores of `GraNd`."""

    def score(self, rows: Rows) -> Tensor:
        """Norms in the parameters of the scope."""
        return rows.jacobian.squared_norms().sqrt()


def checked_quotas(labels: Tensor | None, count: int, policy: ClassPolicy, total: int) -> dict[int, int]:
    """Divide a number of samples among the groups of a policy, after a look at the number.

    Args:
        labels: ``[N]`` or None.
        count: How many samples.
        policy: Class policy.
        total: N.

    Returns:
        How many of each group.

    Raises:
        InvalidOptionError: If there are not that many samples, or labels are missing.
    """
    if not 1 <= count <= total:
        raise InvalidOptionError(f"count={count}: the data has {total} samples; keep 1 to {total} of them.")
    return quotas(labels, count, policy)
