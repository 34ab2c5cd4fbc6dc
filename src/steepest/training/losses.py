"""Losses per sample, and the residuals behind them where there are any."""

from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from steepest.errors import InvalidOptionError

__all__ = ["CrossEntropy", "LabelRegression", "Loss", "SquaredError"]


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
        """Signed residuals whose squares sum to the loss, one row per output component."""
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
        """Refuse: cross-entropy is no sum of squares.

        Args:
            outputs: Scores `[B, C]`.
            targets: Class numbers `[B]`.

        Raises:
            InvalidOptionError: Always.
        """
        del outputs, targets
        raise InvalidOptionError(
            "rows='residuals' was asked for with a cross-entropy loss: it is no sum of squares and has no "
            "residuals; use rows='losses' or a regression task"
        )


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
            `[B * K]`, sample by sample.
        """
        return (outputs - targets).flatten()


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
            `[B * C]`, sample by sample.
        """
        return _from_onehot(outputs, targets).flatten()


def _from_onehot(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs - F.one_hot(targets, outputs.shape[1]).to(outputs.dtype)
