"""Smooth layers for networks that solve equations: sines, Fourier features, a fixed scaling of the inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from steepest._validation import check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.nn.jets import Jet

__all__ = ["Affine", "FourierFeatures", "Sine"]


class Sine(nn.Module):
    """The activation ``sin(frequency * a)`` (arXiv 2006.09661).

    Args:
        frequency: Factor of the input, above 0.

    Raises:
        InvalidOptionError: If the frequency is no number above 0.

    Example:
        >>> Sine(2.0)(torch.tensor([math.pi / 4])).item()
        1.0
    """

    def __init__(self, frequency: float = 1.0) -> None:
        super().__init__()
        self.frequency = check_real("frequency", frequency, low=0, open_low=True)

    def forward(self, a: Tensor) -> Tensor:
        """Compute the sine."""
        return torch.sin(self.frequency * a)

    def jet(self, jet: Jet) -> Jet:
        """The same with derivatives."""
        w = self.frequency

        def curve(a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            sine = torch.sin(w * a)
            return sine, w * torch.cos(w * a), -w * w * sine

        return jet.map(curve)

    def extra_repr(self) -> str:
        """The frequency."""
        return f"frequency={self.frequency:g}"


class Affine(nn.Module):
    """A fixed scaling ``scale * x + offset`` of the inputs, such as to bring a domain to [-1, 1].

    Args:
        scale: A number, or one for every input.
        offset: The same.

    Example:
        >>> Affine(2.0, -1.0)(torch.tensor([[0.0, 1.0]])).tolist()
        [[-1.0, 1.0]]
    """

    scale: Tensor
    offset: Tensor

    def __init__(self, scale: float | Sequence[float], offset: float | Sequence[float] = 0.0) -> None:
        super().__init__()
        # float64 from the beginning: .double() later would keep the rounding of float32.
        self.register_buffer("scale", torch.as_tensor(scale, dtype=torch.float64))
        self.register_buffer("offset", torch.as_tensor(offset, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Scale and shift."""
        return self.scale.to(x.dtype) * x + self.offset.to(x.dtype)

    def jet(self, jet: Jet) -> Jet:
        """The same with derivatives."""
        return jet * self.scale.to(jet.value.dtype) + self.offset.to(jet.value.dtype)


class FourierFeatures(nn.Module):
    """Cosines and sines of random linear functions of the inputs, fixed from the beginning (arXiv 2006.10739).

    Args:
        in_features: Number of inputs.
        count: Number of random functions: twice as many features come out.
        deviation: Standard deviation of the frequencies, in waves per unit of the inputs.
        seed: Of the generator that draws them, which is their own.

    Raises:
        InvalidOptionError: If a number is impossible.

    Example:
        >>> FourierFeatures(2, 16)(torch.zeros(5, 2)).shape
        torch.Size([5, 32])
    """

    angular: Tensor

    def __init__(self, in_features: int, count: int, *, deviation: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        check_integer("in_features", in_features, low=1)
        check_integer("count", count, low=1)
        check_real("deviation", deviation, low=0, open_low=True)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(count, in_features, generator=generator, dtype=torch.float64)
        self.register_buffer("angular", 2 * math.pi * deviation * drawn)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features."""
        self._check(x.shape[-1])
        angles = x @ self.angular.to(x.dtype).T
        return torch.cat([angles.cos(), angles.sin()], -1)

    def jet(self, jet: Jet) -> Jet:
        """The same with derivatives."""
        self._check(jet.value.shape[-1])
        angles = jet.linear(lambda stacked: stacked @ self.angular.to(stacked.dtype).T)
        cosines = angles.map(lambda a: (a.cos(), -a.sin(), -a.cos()))
        return cosines.beside(angles.map(lambda a: (a.sin(), a.cos(), -a.sin())))

    def _check(self, found: int) -> None:
        if found != self.angular.shape[1]:
            raise InvalidOptionError(
                f"inputs have {found} features, and these Fourier features are for {self.angular.shape[1]}: give those."
            )
