"""The geometry of a convolution: its arguments in one form, and the patches that its outputs see."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["ConvShape"]


@dataclass(frozen=True)
class ConvShape:
    """The arguments of a convolution.

    Args:
        weight_shape: ``[out_channels, in_channels / groups, *kernel]``.
        pad: Zeros before and after each spatial dimension, the last dimension first, as `F.pad` takes them.
        stride: One number for each spatial dimension.
        dilation: Likewise.
        groups: Number of groups.
    """

    weight_shape: torch.Size
    pad: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @classmethod
    def of(
        cls,
        weight_shape: torch.Size,
        stride: int | Sequence[int],
        padding: str | int | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
    ) -> Self:
        """Make it of the arguments as `F.conv2d` takes them."""
        spatial = len(weight_shape) - 2
        step, spread = _spatial(stride, spatial), _spatial(dilation, spatial)
        return cls(weight_shape, _pads(padding, weight_shape[2:], spread), step, spread, groups)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve."""
        convolve = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(self.stride)]
        out: Tensor = convolve(F.pad(x, self.pad), weight, bias, self.stride, 0, self.dilation, self.groups)
        return out

    def weight_grad(self, x: Tensor, output_grads: Tensor) -> Tensor:
        """Gradient in the weight, by the backend's own kernel."""
        zeros = [0] * len(self.stride)
        dummy = x.new_empty(1).expand(self.weight_shape)
        _, grad, _ = torch.ops.aten.convolution_backward(
            output_grads, F.pad(x, self.pad), dummy, None, list(self.stride), zeros, list(self.dilation), False, zeros,
            self.groups, [False, True, False],
        )  # fmt: skip
        weight_grad: Tensor = grad
        return weight_grad

    def patches(self, x: Tensor) -> Tensor:
        """Gather what each output position sees, image by image.

        Args:
            x: ``[B, C, *spatial]``.

        Returns:
            ``[B, groups, C / groups * prod(kernel), positions]``, features ordered as the weight's trailing dimensions.
        """
        windows, spatial = self._windows(x), len(self.stride)  # with positions last, copies run along memory
        order = (*range(2 + spatial, 2 + 2 * spatial), *range(2, 2 + spatial))
        return windows.permute(0, 1, *order).reshape(x.shape[0], self.groups, self.weight_shape[1:].numel(), -1)

    def row_patches(self, x: Tensor, merged: int) -> Tensor:
        """Gather the same sample by sample, where every sample has ``merged`` adjacent images.

        Args:
            x: ``[B * merged, C, *spatial]``.
            merged: Images of a sample.

        Returns:
            ``[B, groups, C / groups * prod(kernel), merged * positions]``.
        """
        patches = self.patches(x)
        if merged == 1:
            return patches
        return patches.view(-1, merged, *patches.shape[1:]).permute(0, 2, 3, 1, 4).flatten(3)

    def columns(self, x: Tensor, *, ones: bool) -> Tensor:
        """Gather the same of all images side by side, in one copy; of a convolution without groups.

        Args:
            x: ``[B, C, *spatial]``.
            ones: Whether to join a last row of ones.

        Returns:
            ``[C * prod(kernel) (+ 1), B * positions]``.
        """
        windows, spatial = self._windows(x), len(self.stride)
        windows = windows.permute(1, *range(2 + spatial, 2 + 2 * spatial), 0, *range(2, 2 + spatial))
        features = self.weight_shape[1:].numel()
        columns = x.new_empty(features + ones, windows.shape[1 + spatial :].numel())
        columns[:features].view(windows.shape).copy_(windows)
        columns[features:] = 1
        return columns

    def _windows(self, x: Tensor) -> Tensor:
        """``[B, C, *positions, *kernel]``, a view of the padded images."""
        x = F.pad(x, self.pad)
        arguments = zip(self.weight_shape[2:], self.stride, self.dilation, strict=True)
        for dim, (size, stride, dilation) in enumerate(arguments, 2):
            x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
        return x


def _spatial(value: int | Sequence[int], spatial: int) -> tuple[int, ...]:
    sizes = (value,) if isinstance(value, int) else tuple(value)
    return sizes * spatial if len(sizes) == 1 else sizes


def _pads(padding: str | int | Sequence[int], kernel: Sequence[int], dilation: Sequence[int]) -> tuple[int, ...]:
    """Zeros before and after each spatial dimension, the last one first."""
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):  # "same": an odd zero goes behind, as torch does it
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return tuple(n for total in reversed(totals) for n in (total // 2, total - total // 2))
    return tuple(n for size in reversed(_spatial(padding, len(kernel))) for n in (size, size))
