"""Losses per sample, and the residuals behind them where there are any."""

from typing import Protocol, runtime_checkable

from torch import Tensor
from torch.nn import functional as F

__all__ = ["BalancedLoss", "CrossEntropy", "LabelRegression", "Loss", "SquaredError"]


class Loss(Protocol):
    """What the loop needs of a loss."""

    @property
    def name(self) -> str:
        """Short name, as the axis of a plot has it."""
        ...

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """One loss per sample, `[B]`."""
        ...

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Signed residuals whose squares sum to the loss, `[B]` or `[B, K]`; or rows that stand in for them."""
        ...


@runtime_checkable
class BalancedLoss(Loss, Protocol):
    """A loss whose mean over a split is another than that of its samples, which have weights of the training split."""

    def mean(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss of a whole split, a scalar."""
        ...


class CrossEntropy:
    """Cross-entropy of class scores `[B, C]` against class numbers `[B]`."""

    name = "cross-entropy"

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Unreduced losses.

        Args:
            outputs: Scores `[B, C]`.
            targets: Class numbers `[B]`.

        Returns:
            `[B]`.
        """
        return F.cross_entropy(outputs, targets, reduction="none")

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Rows of the generalised Gauss-Newton matrix, as cross-entropy is no sum of squares.

        Args:
            outputs: Scores `[B, C]`.
            targets: Class numbers `[B]`.

        Returns:
            `[B, C]`, see `steepest.ggn_rows`: a step by them is a Gauss-Newton step of the cross-entropy.
        """
        from steepest.optim.ggn import ggn_rows

        return ggn_rows(outputs, targets)


class SquaredError:
    """Squared error `|f - y|^2`, summed over the outputs of a sample."""

    name = "squared error"

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Unreduced losses.

        Args:
            outputs: `[B, K]`.
            targets: `[B, K]`.

        Returns:
            `[B]`.
        """
        return (outputs - targets).square().flatten(start_dim=1).sum(dim=1)

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Signed residuals.

        Args:
            outputs: `[B, K]`.
            targets: `[B, K]`.

        Returns:
            `[B, K]`; of one output `[B]`.
        """
        residuals = (outputs - targets).flatten(start_dim=1)
        return residuals.squeeze(1)


class LabelRegression:
    """Squared distance `|f - onehot(y)|^2` of scores `[B, C]` from class numbers `[B]`."""

    name = "label regression"

    def per_sample(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Unreduced losses.

        Args:
            outputs: Scores `[B, C]`.
            targets: Class numbers `[B]`.

        Returns:
            `[B]`.
        """
        return _from_onehot(outputs, targets).square().sum(dim=1)

    def residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Signed residuals.

        Args:
            outputs: Scores `[B, C]`.
            targets: Class numbers `[B]`.

        Returns:
            `[B, C]`.
        """
        return _from_onehot(outputs, targets)


def _from_onehot(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs - F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
