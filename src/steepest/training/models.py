"""Small models of the training tasks."""

from itertools import pairwise

from torch import nn

__all__ = ["mlp"]


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers with GELU between them and torch's default initialisation.

    Args:
        *widths: Width of the input, of every hidden layer and of the output.

    Returns:
        The model.

    Example:
        >>> sum(p.numel() for p in mlp(1, 16, 16, 16, 1).parameters())
        593
    """
    layers: list[nn.Module] = []
    for fan_in, fan_out in pairwise(widths):
        layers += [nn.Linear(fan_in, fan_out), nn.GELU()]
    return nn.Sequential(*layers[:-1])
