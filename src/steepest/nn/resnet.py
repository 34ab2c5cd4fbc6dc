"""A small residual network for images, in the form that is usual on CIFAR (arXiv 1512.03385)."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from steepest._validation import check_choice, check_integer
from steepest.errors import InvalidOptionError

__all__ = ["Norm", "ResNet", "normalisation"]

Norm = Literal["group", "batch"]

# At most 8 groups, and at least 4 channels in each: a group of one value would be normalised to zero.
_MOST_GROUPS, _LEAST_CHANNELS = 8, 4


def normalisation(norm: Norm, width: int) -> nn.Module:
    """The layer of this kind behind a convolution of so many channels."""
    if norm == "batch":
        return nn.BatchNorm2d(width)
    possible = range(1, min(_MOST_GROUPS, width // _LEAST_CHANNELS) + 1)
    return nn.GroupNorm(max((groups for groups in possible if width % groups == 0), default=1), width)


def _convolution(norm: Norm, before: int, after: int, *, size: int = 3, stride: int = 1) -> nn.Sequential:
    # No bias: the normalisation has one.
    conv = nn.Conv2d(before, after, size, stride=stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, normalisation(norm, after))


class _Block(nn.Module):
    """Two convolutions of 3 x 3 and the input added to their output, through a projection where shapes differ."""

    def __init__(self, norm: Norm, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = _convolution(norm, before, after, stride=stride)
        self.second = _convolution(norm, after, after)
        fits = before == after and stride == 1
        self.shortcut = nn.Identity() if fits else _convolution(norm, before, after, size=1, stride=stride)

    def forward(self, images: Tensor) -> Tensor:
        residual: Tensor = self.second(F.relu(self.first(images)))
        return F.relu(residual + self.shortcut(images))


class ResNet(nn.Module):
    """A small residual network for images `[B, C, H, W]` of any size.

    A 3 x 3 convolution, stages of basic blocks, the mean over all pixels and a linear layer. Every stage after the
    first begins with a step of 2 pixels, and a 1 x 1 projection carries its input past the block. Nothing is edited
    in place. Weights have torch's default initialisation.

    With `norm="group"` samples do not interact, so that `steepest.Capture` gives exact per-sample gradients; a group
    holds 4 channels or more, and there are 8 groups at most. `norm="batch"` is BatchNorm, for comparisons with the
    literature: in training mode it mixes the samples and `steepest.Capture` refuses it.

    Args:
        in_channels: Channels of the images.
        out_features: Numbers put out per image, such as one score per class.
        widths: Channels of every stage.
        blocks: Blocks of every stage.
        norm: "group" or "batch".

    Raises:
        InvalidOptionError: If a number is no integer above 0, or widths and blocks differ in length.

    Example:
        >>> import torch
        >>> model = ResNet(3, 10)
        >>> sum(p.numel() for p in model.parameters())
        78042
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        *,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (1, 1, 1),
        norm: Norm = "group",
    ) -> None:
        super().__init__()
        check_integer("in_channels", in_channels, low=1)
        check_integer("out_features", out_features, low=1)
        check_choice("norm", norm, ("group", "batch"))
        if not widths or len(widths) != len(blocks):
            raise InvalidOptionError(
                f"widths={tuple(widths)} and blocks={tuple(blocks)}: give one width and one number of blocks for "
                "every stage, and at least one stage."
            )
        for stage, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            check_integer(f"widths[{stage}]", width, low=1)
            check_integer(f"blocks[{stage}]", count, low=1)
        self.stem = _convolution(norm, in_channels, widths[0])
        layers = [_Block(norm, widths[0], widths[0], 1) for _ in range(blocks[0])]
        for (before, after), count in zip(pairwise(widths), blocks[1:], strict=True):
            layers += [_Block(norm, before, after, 2), *(_Block(norm, after, after, 1) for _ in range(count - 1))]
        self.blocks = nn.Sequential(*layers)
        self.head = nn.Linear(widths[-1], out_features)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            images: `[B, C, H, W]`.

        Returns:
            `[B, out_features]`.
        """
        features: Tensor = self.blocks(F.relu(self.stem(images)))
        outputs: Tensor = self.head(features.mean(dim=(2, 3)))
        return outputs
