"""Softmax-free attention in one function, in pieces: beside the kernel nothing of its size, forward or backward."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from steepest.linalg.gaussian import centre_of, evaluate, gaussian_kernel, no_autocast, pieces, through_distances

__all__ = ["Mix", "composed", "fused", "transformed"]

# What happens to the values at the landmarks: points [..., m, d] and gathered values [..., m, e] to mixed values.
Mix = Callable[[Tensor, Tensor], Tensor]


def composed(x: Tensor, y: Tensor, values: Tensor, mix: Mix, scale: float, drop: Callable[[Tensor], Tensor]) -> Tensor:
    """Gather values at the landmarks, mix them, spread them again; the plain form.

    Args:
        x: Queries, `[..., n, d]`.
        y: Landmarks, `[..., m, d]`.
        values: `[..., n, e]`.
        mix: What happens at the landmarks.
        scale: Of the squared distances.
        drop: What happens to the kernel before values are gathered by it.

    Returns:
        `[..., n, e]`.
    """
    kernel = gaussian_kernel(x, y, scale)
    return kernel @ mix(y, drop(kernel).mT @ values)


def transformed(*tensors: Tensor) -> bool:
    """Whether one of the tensors is within a transform of torch.func, or a batch of gradients for autograd.grad."""
    tell = torch._C._functorch
    return any(tell.is_functorch_wrapped_tensor(t) or tell.is_legacy_batchedtensor(t) for t in tensors)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, values: Tensor, mix: Mix, scale: float) -> Tensor:
        kernel = evaluate(x, y, scale)
        gathered = kernel.mT @ values
        ctx.mix, ctx.scale = mix, scale
        ctx.save_for_backward(x, y, values, kernel, gathered)
        return kernel @ mix(y, gathered)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        with no_autocast(grad.device):  # as in the forward, wherever the backward is called
            way = _differentiable_grads if torch.is_grad_enabled() or transformed(grad) else _grads
            return *way(ctx.saved_tensors, ctx.mix, ctx.scale, grad), None, None


def _differentiable_grads(
    saved: tuple[Tensor, ...], mix: Mix, scale: float, grad: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with a graph of their own, for second derivatives and batches of gradients: through the plain form."""
    with torch.enable_grad():
        # Views: the same tensor may be two of them, and landmarks may come from the queries.
        x, y, values = (t.view_as(t) if t.requires_grad else t.detach().requires_grad_() for t in saved[:3])
        out = composed(x, y, values, mix, scale, lambda kernel: kernel)
    create = torch.is_grad_enabled()
    grad_x, grad_y, grad_values = torch.autograd.grad(out, (x, y, values), grad, create_graph=create)
    return grad_x, grad_y, grad_values


def _grads(saved: tuple[Tensor, ...], mix: Mix, scale: float, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, y, values, kernel, gathered = saved
    with torch.enable_grad():
        leaves = y.detach().requires_grad_(), gathered.detach().requires_grad_()
        mixed = mix(*leaves)
    grad_y, grad_gathered = torch.autograd.grad(mixed, leaves, kernel.mT @ grad)
    centre = centre_of(y)
    right, from_out, from_values = y - centre, scale * mixed.detach().mT, scale * grad_gathered.mT
    grad_x, grad_values = torch.empty_like(x), torch.empty_like(values)
    for rows in pieces(x, y):
        part = kernel[..., rows, :]
        grad_values[..., rows, :] = part @ grad_gathered
        weights = grad[..., rows, :] @ from_out
        weights += values[..., rows, :] @ from_values
        weights *= part
        grad_x[..., rows, :], more = through_distances(weights, x[..., rows, :] - centre, right)
        grad_y = grad_y + more
    return grad_x, grad_y, grad_values


def fused(x: Tensor, y: Tensor, values: Tensor, mix: Mix, scale: float) -> Tensor:
    """`composed` without dropping, with the kernel as the only tensor of its size; not for torch.func transforms.

    Args:
        x: Queries, `[..., n, d]`.
        y: Landmarks, `[..., m, d]`.
        values: `[..., n, e]`.
        mix: What happens at the landmarks; it is called again in the backward.
        scale: Of the squared distances.

    Returns:
        `[..., n, e]`.
    """
    out: Tensor = _Fused.apply(x, y, values, mix, scale)  # type: ignore[no-untyped-call]
    return out
