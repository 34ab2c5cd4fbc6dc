"""L-BFGS, from torch: on mini-batches, and on the whole training split."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from steepest.training.losses import Loss
from steepest.training.optimizer import Diagnosis, OptimizerEntry
from steepest.training.rivals import keep_lr, remember_lr
from steepest.training.steps import closure_step

# Samples that go through the model at a time: the whole split at once may not fit into memory.
_CHUNK = 2048


class FullBatchLBFGS(torch.optim.LBFGS):
    """torch.optim.LBFGS with a strong Wolfe search, which alone decides about the length of a step.

    Args:
        params: Parameters.
        lr: Where every line search begins; the schedule of the run does not change it.
        max_iter: Iterations in one step, that is in one epoch.
        max_eval: Evaluations of the whole split in one step; None for 1.25 times max_iter.
        tolerance_grad: A step ends where no component of the gradient is larger.
        tolerance_change: A step ends where parameters or loss change less.
        history_size: Changes of the gradient that are remembered.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float = 1.0,
        max_iter: int = 10,
        max_eval: int | None = None,
        tolerance_grad: float = 1e-9,
        tolerance_change: float = 1e-12,
        history_size: int = 20,
    ) -> None:
        super().__init__(
            params,
            lr=lr,
            max_iter=max_iter,
            max_eval=max_eval,
            tolerance_grad=tolerance_grad,
            tolerance_change=tolerance_change,
            history_size=history_size,
            line_search_fn="strong_wolfe",
        )
        remember_lr(self)


def chunked_closure_step(
    optimizer: torch.optim.Optimizer, model: nn.Module, loss: Loss, inputs: Tensor, targets: Tensor
) -> Tensor:
    """A closure that sums the mean loss and its gradient over chunks of the batch.

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
        total = torch.zeros((), dtype=torch.float64, device=inputs.device)
        with torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            for part, expected in zip(inputs.split(_CHUNK), targets.split(_CHUNK), strict=True):
                share = loss.per_sample(model(part), expected).sum() / len(inputs)
                torch.autograd.backward(share)
                total += share.detach()
        if not first:
            first.append(total)
        return total.item()

    optimizer.step(closure)
    return first[0]


def _diagnose(optimizer: torch.optim.Optimizer) -> Diagnosis:
    state = optimizer.state[optimizer.param_groups[0]["params"][0]]
    return {"passes": float(state.get("func_evals", 0))}


ENTRIES = [
    OptimizerEntry(
        name="lbfgs",
        label="L-BFGS",
        description="torch.optim.LBFGS on mini-batches: 4 inner iterations, history 10, strong Wolfe search",
        constructor=lambda: torch.optim.LBFGS,
        takes="parameters",
        step=lambda _options: closure_step,
        lr_range=(1e-3, 1.0),
        options={"max_iter": 4, "history_size": 10, "line_search_fn": "strong_wolfe"},
        colour="#CC79A7",
    ),
    OptimizerEntry(
        name="lbfgs-full",
        label="L-BFGS, full batch",
        description="torch.optim.LBFGS on the whole training split: an epoch is one step of 10 iterations, which is "
        "about 12 passes over the data; compare it by --budget-seconds",
        constructor=lambda: FullBatchLBFGS,
        takes="parameters",
        step=lambda _options: chunked_closure_step,
        lr_range=(1e-1, 1.0),
        full_batch=True,
        anneal=keep_lr,
        diagnose=_diagnose,
        colour="#304848",
    ),
]
