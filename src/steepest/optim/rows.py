"""From what a closure returns to the conditions that a step solves."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from steepest.engine import Rows
from steepest.errors import ClosureError, NonFiniteError

__all__ = ["RowKind", "check_weights", "conditions", "mean_loss", "row_values", "sample_sizes", "weighted"]

RowKind = Literal["losses", "residuals"]

_SHAPES = {"losses": "(batch,)", "residuals": "(batch,) or (batch, K)"}


def conditions(output: Any, kind: RowKind, kappa: float, samples_per_row: int) -> Rows:
    """Check a closure's result and turn it into rows.

    Args:
        output: What the closure returned.
        kind: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``.
        samples_per_row: Losses averaged into one row.

    Returns:
        Rows with graph, in the form of the output: ``[B]``, or of residuals also ``[B, K]``.

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
            f"{_SHAPES[kind]} or a dict of such tensors."
        )
    if not (block.ndim == 1 or (block.ndim == 2 and kind == "residuals")) or block.numel() == 0:
        raise ClosureError(
            f"The closure returned a {name} of shape {tuple(block.shape)}: return the unreduced {kind} of each sample, "
            f"shape {_SHAPES[kind]}.{_hint(block, kind)}"
        )
    if not block.requires_grad:
        raise ClosureError(
            f"The {name} that the closure returned has no graph: compute it from the model's output in the closure, "
            "without detach(), item(), no_grad() or backward()."
        )
    if not block.isfinite().all():
        bad = int((~block.isfinite()).sum())
        raise NonFiniteError(
            f"{bad} of {block.numel()} {kind} in the closure's {name} are NaN or infinite; parameters and optimizer "
            "state are unchanged. Remedy: look for bad inputs, lower the learning rate, or set on_nonfinite='skip'."
        )
    if kind == "residuals":
        return block
    return _loss_rows(name, block, kappa, samples_per_row)


def _hint(block: Tensor, kind: RowKind) -> str:
    if block.ndim == 0:
        return " It looks reduced: use reduction='none' and call no mean()."
    if kind == "losses" and block.ndim == 2:
        return " Several numbers for each sample are residuals: build the optimizer with rows='residuals', or sum them."
    return " Bring more dimensions to two with .flatten(1)." if block.ndim > 2 else ""


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
        kind: Residuals are squared, and summed over those of a sample.

    Returns:
        A detached scalar.
    """
    blocks = output.values() if isinstance(output, Mapping) else [output]
    means = [(_squares(b.detach()) if kind == "residuals" else b.detach()).mean() for b in blocks]
    return torch.stack(means).sum()


def _squares(residuals: Tensor) -> Tensor:
    """The loss of every sample, the sum of its squared residuals."""
    squares = residuals.square()
    return squares.sum(1) if squares.ndim == 2 else squares


def sample_sizes(rows: Rows) -> list[tuple[int, int]]:
    """How many samples every block of rows has, and how many rows each of them.

    Args:
        rows: The conditions, ``[B]`` or ``[B, K]``, or a dict of such blocks.

    Returns:
        The two numbers, block by block.
    """
    blocks = rows.values() if isinstance(rows, Mapping) else [rows]
    return [(len(block), 1 if block.ndim == 1 else block.shape[1]) for block in blocks]


def weighted(output: Any, weights: Mapping[str, float], kind: RowKind) -> Any:
    """Give every block of conditions its weight in the loss.

    Args:
        output: What the closure returned.
        weights: A weight for some blocks; 1 for the others.
        kind: Residuals are multiplied with the root of their weight.

    Returns:
        The same with weighted blocks.
    """
    if not weights or not isinstance(output, Mapping):
        return output
    scale = {name: weight**0.5 if kind == "residuals" else weight for name, weight in weights.items()}
    return {name: block * scale[str(name)] if str(name) in scale else block for name, block in output.items()}


def check_weights(weights: Mapping[str, float], names: Iterable[object]) -> None:
    """Refuse a weight that has no block.

    Args:
        weights: A weight for some blocks.
        names: The blocks that there are, of all processes.

    Raises:
        ClosureError: If there is no block of that name.
    """
    named = list(dict.fromkeys(str(name) for name in names if name is not None))
    unknown = sorted(set(weights) - set(named))
    if unknown:
        found = f"the blocks {', '.join(map(repr, named))}" if named else "no named blocks"
        raise ClosureError(
            f"There is a weight for {unknown[0]!r}, and the closure returned {found}: return a dict with that name, or "
            "drop the weight."
        )


def row_values(output: Any, kind: RowKind, kappa: float, samples_per_row: int) -> Tensor:
    """The rows that an output gives, finite or not, without a graph.

    Args:
        output: What the closure returned.
        kind: "losses" or "residuals".
        kappa: Rows of losses are ``l ** (kappa / 2)``.
        samples_per_row: Losses averaged into one row.

    Returns:
        ``[R]``.
    """
    parts = []
    for block in output.values() if isinstance(output, Mapping) else [output]:
        values = block.detach().flatten()
        if kind == "losses":
            values = values.view(-1, samples_per_row).mean(1)
            values = values if kappa == 2 else values.clamp(min=0) ** (kappa / 2)
        parts.append(values)
    return torch.cat(parts)
