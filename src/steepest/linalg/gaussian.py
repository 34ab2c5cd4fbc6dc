"""The Gaussian kernel of two sets of points, with a backward that keeps one matrix."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["gaussian_gram", "gaussian_kernel"]


class _GaussianKernel(torch.autograd.Function):
    """Saves the kernel itself and the points; autograd through the formula would keep three matrices of its size."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor) -> Tensor:
        exponent = torch.matmul(x, y.mT)
        exponent.sub_(x.square().sum(-1, keepdim=True).mul_(0.5)).sub_(y.square().sum(-1).mul_(0.5).unsqueeze(-2))
        return exponent.clamp_max_(0.0).exp_()  # rounding can make a squared distance negative

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, y, kernel = ctx.saved_tensors
        weights = grad * kernel  # d exp(-|x - y|^2 / 2) = exp(...) (y - x) dx
        grad_x = weights @ y - weights.sum(-1, keepdim=True) * x
        grad_y = weights.mT @ x - weights.sum(-2).unsqueeze(-1) * y
        return grad_x, grad_y


def gaussian_kernel(x: Tensor, y: Tensor) -> Tensor:
    r"""Gaussian kernel between two sets of points.

    .. math:: K_{ij} = \exp(-|x_i - y_j|^2 / 2)

    Squared distances are expanded, :math:`|x|^2 - 2 x y + |y|^2`, after both sets are moved to the mean of `y`, which
    changes no distance: rounding is about machine epsilon times the squared distance of the farthest point from
    there. Coordinates beyond about 1e18 (float32) are cut, so that nothing overflows. NaN stays NaN.

    Args:
        x: `[..., n, d]`.
        y: `[..., m, d]`, with the same leading dimensions.

    Returns:
        `[..., n, m]`, between 0 and 1.

    Example:
        >>> gaussian_kernel(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0]]))
        tensor([[1.0000],
                [0.1353]])
    """
    centre = y.detach().mean(-2, keepdim=True)
    # Half the sum of d squares of either point and their product stay in range.
    most = (torch.finfo(y.dtype).max / (8 * y.shape[-1])) ** 0.5
    kernel: Tensor = _GaussianKernel.apply((x - centre).clamp(-most, most), (y - centre).clamp(-most, most))  # type: ignore[no-untyped-call]
    return kernel


def gaussian_gram(points: Tensor) -> Tensor:
    """Gaussian kernel of points with themselves, positive semidefinite to rounding and 1 on the diagonal.

    Distances are computed in float64: in float32 the rounding of points far apart can exceed any reasonable ridge, and
    then no factorisation of the matrix exists.

    Args:
        points: `[..., m, d]`.

    Returns:
        `[..., m, m]` in the type of the points.

    Example:
        >>> gaussian_gram(torch.tensor([[0.0], [2.0]]))
        tensor([[1.0000, 0.1353],
                [0.1353, 1.0000]])
    """
    # Apple's GPUs have no float64.
    wide = points if points.device.type == "mps" else points.double()
    gram = gaussian_kernel(wide, wide).to(points.dtype)
    identity = torch.eye(gram.shape[-1], dtype=torch.bool, device=gram.device)
    # Not masked_fill with 1: NaN must stay.
    return torch.where(identity & (gram > 0), 1.0, gram)
