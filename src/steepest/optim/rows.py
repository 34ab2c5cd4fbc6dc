"""From what a closure returns to the conditions that a step solves."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.engine import Rows
from steepest.errors import ClosureError, NonFiniteError

__all__ = ["RowKind", "conditions", "mean_loss"]

RowKind = Literal["losses", "residuals"]


def conditions(output: Any, kind: RowKind, kappa: float, samples_per_row: int) -> Rows:
    """Check a closure's result and turn it into rows.

    Args:
        output: What the closure returned.
        kind: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``.
        samples_per_row: Losses averaged into one row.

    Returns:
        Rows with graph, in the form of the output.

    Raises:
        ClosureError: If it is nothing that rows can be made of.
        NonFiniteError: If it holds NaN or infinity.
    """
    if isinstance(output, Mapping):
        if not output:
            raise ClosureError("The closure returned an empty dict: return at least one named block of rows.")
        return {
            str(name): _block(f"block {name!r}", block, kind, kappa, samples_per_row) for name, block in output.items()
        }
    return _block("tensor", output, kind, kappa, samples_per_row)


def _block(name: str, block: Any, kind: RowKind, kappa: float, samples_per_row: int) -> Tensor:
    if not isinstance(block, Tensor):
        raise ClosureError(
            f"The closure returned a {type(block).__name__} as {name}: return the unreduced {kind}, a tensor of shape "
            "(batch,) or a dict of such tensors."
        )
    if block.ndim != 1 or len(block) == 0:
        reduced = " It looks reduced: use reduction='none' and call no mean()." if block.ndim == 0 else ""
        raise ClosureError(
            f"The closure returned a {name} of shape {tuple(block.shape)}: return one of the {kind} for each sample, "
            f"shape (batch,).{reduced}"
        )
    if not block.requires_grad:
        raise ClosureError(
            f"The {name} that the closure returned has no graph: compute it from the model's output in the closure, "
            "without detach(), item(), no_grad() or backward()."
        )
    if not block.isfinite().all():
        bad = int((~block.isfinite()).sum())
        raise NonFiniteError(
            f"{bad} of {len(block)} {kind} in the closure's {name} are NaN or infinite; parameters and optimizer state "
            "are unchanged. Remedy: look for bad inputs, lower the learning rate, or set on_nonfinite='skip'."
        )
    if kind == "residuals":
        return block
    return _loss_rows(name, block, kappa, samples_per_row)


def _loss_rows(name: str, losses: Tensor, kappa: float, samples_per_row: int) -> Tensor:
    if samples_per_row > 1:
        if len(losses) % samples_per_row:
            raise ClosureError(
                f"The closure's {name} holds {len(losses)} losses, no multiple of samples_per_row={samples_per_row}: "
                "use batches that are (drop_last=True in the DataLoader)."
            )
        losses = losses.view(-1, samples_per_row).mean(1)
    if kappa == 2:
        return losses
    if (losses < 0).any():
        raise ClosureError(
            f"The closure's {name} holds negative losses, whose power kappa / 2 = {kappa / 2:g} does not exist: "
            "use kappa=2 or a loss that is never negative."
        )
    # A loss of zero is a condition that holds: its row is zero, where the power's derivative would be infinite.
    positive = losses > 0
    return torch.where(positive, torch.where(positive, losses, 1) ** (kappa / 2), 0)


def mean_loss(output: Rows, kind: RowKind) -> Tensor:
    """The number a user wants to see: the mean loss, summed over blocks.

    Args:
        output: What the closure returned.
        kind: Residuals are squared.

    Returns:
        A detached scalar.
    """
    blocks = output.values() if isinstance(output, Mapping) else [output]
    means = [(b.detach().square() if kind == "residuals" else b.detach()).mean() for b in blocks]
    return torch.stack(means).sum()
