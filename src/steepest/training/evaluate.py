"""Loss and metrics of a model on a split."""

from dataclasses import dataclass

import torch
from torch import nn

from steepest.training.data import Split
from steepest.training.losses import BalancedLoss
from steepest.training.records import finite
from steepest.training.task import Task

__all__ = ["Scores", "evaluate"]

# Small enough that evaluation needs less memory than a training step of the larger tasks.
_CHUNK = 1024


@dataclass(frozen=True)
class Scores:
    """Mean loss and metrics of one split."""

    loss: float
    metrics: dict[str, float | None]


@torch.no_grad()
def evaluate(task: Task, model: nn.Module, split: Split) -> Scores:
    """Evaluate in evaluation mode; the model is left in training mode.

    Args:
        task: Says which loss and metrics.
        model: The model.
        split: The data.

    Returns:
        The scores; means are taken in float64.
    """
    model.eval()
    outputs = torch.cat([model(chunk) for chunk in split.inputs.split(_CHUNK)])
    model.train()
    if isinstance(task.loss, BalancedLoss):
        loss = task.loss.mean(outputs, split.targets).item()
    else:
        loss = task.loss.per_sample(outputs, split.targets).double().mean().item()
    metrics = {metric.name: finite(metric.compute(outputs, split.targets)) for metric in task.metrics}
    return Scores(loss, metrics)
