"""Small reference versions of optimizers that torch lacks and comparisons need: signSGD, Signum and Lion.

They are written for being read, without options for speed, and are tested against their papers' formulas.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from steepest._validation import check_real
from steepest.optim._apply import decay

__all__ = ["Lion", "SignSGD"]


class _SignOptimizer(Optimizer):
    """Steps along signs; what they are the signs of is for the child to say."""

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take a step.

        Args:
            closure: As in torch.optim.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is None:
                    continue
                if "momentum_buffer" not in self.state[param]:
                    self.state[param]["momentum_buffer"] = torch.zeros_like(param)
                direction = self._direction(param.grad, self.state[param]["momentum_buffer"], group)
                decay([param], lr=group["lr"], weight_decay=group["weight_decay"])
                param.add_(direction.sign(), alpha=-float(group["lr"]))
        return loss

    def _direction(self, grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        """What the step takes the signs of; updates the momentum."""
        raise NotImplementedError


class SignSGD(_SignOptimizer):
    """Steps along the signs of the gradient, or of its running mean (then called Signum).

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        momentum: Share of the past in the running mean; 0 for signSGD.
        weight_decay: Decoupled weight decay.

    References:
        Bernstein et al., arXiv 1802.04434, algorithms 1 and 2.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> x.grad = torch.tensor([0.001, -50.0])
        >>> _ = SignSGD([x], lr=0.5).step()
        >>> x.tolist()
        [0.5, -1.5]
    """

    def __init__(
        self, params: Iterable[Any], *, lr: float = 1e-3, momentum: float = 0.0, weight_decay: float = 0.0
    ) -> None:
        check_real("lr", lr, low=0)
        check_real("momentum", momentum, low=0, high=1, open_high=True)
        check_real("weight_decay", weight_decay, low=0)
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    def _direction(self, grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        return momentum.lerp_(grad, 1 - group["momentum"])


class Lion(_SignOptimizer):
    """Steps along the signs of a mean of the gradient and its slower running mean.

    Args:
        params: Parameters or groups.
        lr: Learning rate.
        betas: Share of the past in the mean that is stepped along, and in the running mean.
        weight_decay: Decoupled weight decay.

    References:
        Chen et al., arXiv 2302.06675, algorithm 2.

    Example:
        >>> x = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
        >>> x.grad = torch.tensor([0.001, -50.0])
        >>> _ = Lion([x], lr=0.5).step()
        >>> x.tolist()
        [0.5, -1.5]
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        check_real("lr", lr, low=0)
        for number, beta in enumerate(betas):
            check_real(f"betas[{number}]", beta, low=0, high=1, open_high=True)
        check_real("weight_decay", weight_decay, low=0)
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    def _direction(self, grad: Tensor, momentum: Tensor, group: dict[str, Any]) -> Tensor:
        mean = momentum.lerp(grad, 1 - group["betas"][0])
        momentum.lerp_(grad, 1 - group["betas"][1])
        return mean
