"""How an optimizer takes a step: the only difference between optimizers that the loop knows.

Each function gets the optimizer, the model, the loss and one batch, changes the parameters once and
returns the mean loss of the batch before the step, detached, or None if the optimizer skipped the step.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from steepest.distributed import Ranks
from steepest.training.losses import Loss

__all__ = ["StepFunction", "backward_step", "closure_step", "losses_step", "residuals_step"]


class StepFunction(Protocol):
    """One step of an optimizer on one batch."""

    def __call__(
        self, optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
    ) -> Tensor | None:
        """Change the parameters and return the mean loss before the step."""
        ...


def backward_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """The plain loop: `zero_grad`, mean loss, `backward`, `step` (SGD, Adam).

    Args:
        optimizer: A torch optimizer.
        model: The model.
        loss: The loss.
        inputs: Inputs of the batch.
        targets: Targets of the batch.

    Returns:
        The mean loss before the step.
    """
    optimizer.zero_grad(set_to_none=True)
    mean = loss.per_sample(model(inputs), targets).mean()
    torch.autograd.backward(mean)
    optimizer.step()
    return mean.detach()


def closure_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """A closure with `backward` inside, returning the mean loss; it may be called often (L-BFGS).

    On several processes it is the mean over all of them: the optimizer decides by it when to stop.

    Args:
        optimizer: A torch optimizer that takes a closure.
        model: The model.
        loss: The loss.
        inputs: Inputs of the batch.
        targets: Targets of the batch.

    Returns:
        The mean loss of the first evaluation, before the step.
    """
    first: list[Tensor] = []

    def closure() -> float:
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            mean = loss.per_sample(model(inputs), targets).mean()
            torch.autograd.backward(mean)
        value = mean.detach().clone()
        ranks = Ranks.current()
        if ranks is not None:
            ranks.sum_([value])
            value /= ranks.size
        if not first:
            first.append(value)
        return value.item()

    optimizer.step(closure)
    return first[0]


def losses_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor | None:
    """A closure that returns unreduced losses, without `backward` (Sven with rows of losses).

    Args:
        optimizer: An optimizer of steepest.
        model: The model.
        loss: The loss.
        inputs: Inputs of the batch.
        targets: Targets of the batch.

    Returns:
        The mean loss before the step; None if the optimizer skipped the step.
    """
    return _rows_step(optimizer, lambda: loss.per_sample(model(inputs), targets))


def residuals_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor | None:
    """A closure that returns signed residuals, without `backward` (Sven with rows of residuals).

    The mean of their squares is not the loss where they stand in for it, as in cross-entropy: the loss is that of the
    closure's first call. On several processes it is the mean over the samples of all of them.

    Args:
        optimizer: An optimizer of steepest.
        model: The model.
        loss: The loss.
        inputs: Inputs of the batch.
        targets: Targets of the batch.

    Returns:
        The mean loss before the step; None if the optimizer skipped the step.
    """
    first: list[Tensor] = []

    def closure() -> Tensor:
        outputs = model(inputs)
        if not first:
            with torch.no_grad():
                first.append(loss.per_sample(outputs, targets))
        return loss.residuals(outputs, targets)

    if _rows_step(optimizer, closure) is None:
        return None
    total = torch.stack([first[0].sum(), first[0].new_tensor(len(first[0]))])
    ranks = Ranks.current()
    if ranks is not None:
        ranks.sum_([total])
    return total[0] / total[1]


def _rows_step(optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> Tensor | None:
    # torch types a closure as returning a float; steepest's return the rows themselves.
    step: Callable[[Callable[[], Tensor]], Tensor | None] = optimizer.step  # type: ignore[assignment]
    return step(closure)
