"""A task of your own: two spirals, and a network with sines.

From the folder above this one:

steepest compare examples/own_task.py:TASK --optimizers sven,adam
steepest train digits --model examples/own_task.py:Sines
"""

import math

import torch
from torch import Tensor, nn

from steepest.training.data import Splits, split_three_ways
from steepest.training.losses import CrossEntropy
from steepest.training.metrics import ACCURACY
from steepest.training.task import Task

__all__ = ["TASK", "Sines"]


class Sines(nn.Module):
    """Two hidden layers with sines: any `nn.Module` does."""

    def __init__(self, in_features: int, out_features: int, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Linear(in_features, width)
        self.second = nn.Linear(width, width)
        self.last = nn.Linear(width, out_features)

    def forward(self, inputs: Tensor) -> Tensor:
        """Scores of the classes."""
        hidden = torch.sin(self.second(torch.sin(self.first(inputs))))
        scores: Tensor = self.last(hidden)
        return scores


def spirals(data_seed: int) -> Splits:
    """1,000 noisy points on two spirals; the same seed gives the same points."""
    generator = torch.Generator().manual_seed(data_seed)
    arm = torch.arange(1000) % 2
    radius = torch.rand(1000, generator=generator).sqrt()
    angle = 3 * math.pi * radius + math.pi * arm
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    points += 0.02 * torch.randn(points.shape, generator=generator)
    return split_three_ways(points, arm, seed=data_seed)


TASK = Task(
    name="spirals",
    description="1,000 points on two spirals, 2 classes; sine network 2-32-32-2",
    kind="classification",
    load=spirals,
    model=lambda shape: Sines(shape.features, shape.outputs),
    loss=CrossEntropy(),
    metrics=(ACCURACY,),
    batch_size=32,
    epochs=30,
)
