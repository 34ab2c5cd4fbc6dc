"""The Gaussian kernel of two sets of points, evaluated in pieces, with a backward that keeps one matrix."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "centre_of",
    "evaluate",
    "gaussian_gram",
    "gaussian_kernel",
    "no_autocast",
    "pieces",
    "squared_distances",
    "through_distances",
]

# Bytes of the kernel that are worked on at a time: on a CPU what stays in its cache, elsewhere what keeps it busy.
_CPU_PIECE, _DEVICE_PIECE = 1 << 20, 1 << 28


class _Kernel(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, scale: float) -> Tensor:
        return evaluate(x, y, scale)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        *points, ctx.scale = inputs
        ctx.save_for_backward(*points, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, y, kernel = ctx.saved_tensors
        centre = centre_of(y)
        with no_autocast(grad.device):  # as in the forward, wherever the backward is called
            weights = ctx.scale * grad * _differentiable(x, y, kernel, ctx.scale)
            return *through_distances(weights, x - centre, y - centre), None


class _Gram(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(points: Tensor, scale: float) -> Tensor:
        return squared_distances(points).mul_(-0.5 * scale).exp_()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        points, ctx.scale = inputs
        ctx.save_for_backward(points, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        points, gram = ctx.saved_tensors
        from_mean = points - centre_of(points)
        with no_autocast(grad.device):
            weights = ctx.scale * (grad + grad.mT) * gram
            return weights @ from_mean - weights.sum(-1, keepdim=True) * from_mean, None


def gaussian_kernel(x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
    r"""Gaussian kernel between two sets of points.

    .. math:: K_{ij} = \exp(-s |x_i - y_j|^2 / 2)

    Squared distances are expanded, :math:`|x|^2 - 2 x y + |y|^2`, after both sets are moved to the mean of `y`, which
    changes no distance: rounding is about machine epsilon times the squared distance of the farthest point from
    there. Coordinates beyond about 1e18 (float32) are cut, so that nothing overflows. NaN stays NaN.

    Args:
        x: `[..., n, d]`.
        y: `[..., m, d]`, with the same leading dimensions.
        scale: s.

    Returns:
        `[..., n, m]`, between 0 and 1.

    Example:
        >>> gaussian_kernel(torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0]]))
        tensor([[1.0000],
                [0.1353]])
    """
    kernel: Tensor = _Kernel.apply(x, y, scale)  # type: ignore[no-untyped-call]
    return kernel


def gaussian_gram(points: Tensor, scale: float = 1.0) -> Tensor:
    """Gaussian kernel of points with themselves, positive semidefinite to rounding and 1 on the diagonal.

    Distances are sums of squared differences: the rounding of expanded squares, for points far from their mean, can
    exceed any reasonable ridge, and then no factorisation of the matrix exists.

    Args:
        points: `[..., m, d]`, float32 or float64.
        scale: Of the squared distances.

    Returns:
        `[..., m, m]`, symmetric to the last bit.

    Example:
        >>> gaussian_gram(torch.tensor([[0.0], [2.0]]))
        tensor([[1.0000, 0.1353],
                [0.1353, 1.0000]])
    """
    gram: Tensor = _Gram.apply(points, scale)  # type: ignore[no-untyped-call]
    return gram


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast switched off for the type of a device; where there is none, as for "meta", nothing."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


def centre_of(y: Tensor) -> Tensor:
    """The point that both sets are moved to before distances are expanded; no gradient goes through it."""
    return y.detach().mean(-2, keepdim=True)


def evaluate(x: Tensor, y: Tensor, scale: float) -> Tensor:
    """`gaussian_kernel` without gradients."""
    centre, root = centre_of(y), math.sqrt(scale)
    # Half the sum of d squares of either point and their product stay in range.
    most = math.sqrt(torch.finfo(y.dtype).max / (8 * y.shape[-1]))
    right = ((y - centre) * root).clamp(-most, most)
    half = right.square().sum(-1).mul(0.5).unsqueeze(-2)

    def piece(rows: slice) -> Tensor:
        left = (x[..., rows, :] - centre).mul_(root).clamp(-most, most)
        exponent = left @ right.mT
        exponent.sub_(left.square().sum(-1, keepdim=True).mul_(0.5)).sub_(half)
        return exponent.clamp_max_(0.0).exp_()  # rounding can make a squared distance negative

    parts = pieces(x, y)
    first = piece(parts[0])
    if len(parts) == 1:
        return first
    kernel = first.new_empty((*first.shape[:-2], x.shape[-2], y.shape[-2]))
    kernel[..., parts[0], :] = first
    for rows in parts[1:]:
        kernel[..., rows, :] = piece(rows)
    return kernel


def squared_distances(points: Tensor) -> Tensor:
    """Sums of squared differences of points `[..., m, d]`, without gradients: `[..., m, m]`."""
    if points.device.type == "cpu" and not torch.compiler.is_compiling():
        return torch.cdist(points, points, compute_mode="donot_use_mm_for_euclid_dist").square()
    # On a GPU, cdist spends a block of threads on every pair; the compiler has no cdist of its own.
    others = points.unsqueeze(-3)
    parts = pieces(points, points, points.shape[-1])
    return torch.cat([(points[..., rows, :].unsqueeze(-2) - others).square().sum(-1) for rows in parts], -2)


def _differentiable(x: Tensor, y: Tensor, kernel: Tensor, scale: float) -> Tensor:
    """The kernel as it was saved, or with a graph of its own when somebody asks for second derivatives."""
    return gaussian_kernel(x, y, scale) if torch.is_grad_enabled() else kernel


def through_distances(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the points from the scaled gradient of the kernel times the kernel: d K = s K (y - x) dx."""
    grad_x = weights @ y - weights.sum(-1, keepdim=True) * x
    grad_y = weights.mT @ x - weights.sum(-2).unsqueeze(-1) * y
    return grad_x, grad_y


def pieces(x: Tensor, y: Tensor, width: int = 1) -> list[slice]:
    """Parts of the rows of a kernel that are worth working on at a time.

    Args:
        x: `[..., n, d]`.
        y: `[..., m, d]`.
        width: Numbers that are held for every entry of the kernel.

    Returns:
        Slices that cover 0 to n.
    """
    count = x.shape[-2]
    if torch.compiler.is_compiling():  # the compiler cuts and fuses as it sees fit
        return [slice(0, count)]
    row = x.element_size() * width * y.shape[-2] * math.prod(x.shape[:-2])
    size = max(1, (_CPU_PIECE if x.device.type == "cpu" else _DEVICE_PIECE) // max(row, 1))
    return [slice(begin, min(begin + size, count)) for begin in range(0, count, size)]
