"""The direction of steepest descent in an l_p norm, entry by entry."""

import torch
from torch import Tensor

__all__ = ["lp_direction", "lp_exponent", "lp_weights"]


def lp_exponent(p: float | Tensor) -> float | Tensor:
    """The exponent rho = (p - 2) / (p - 1): 0 for p = 2, and towards 1 as p grows.

    Args:
        p: Order of the norm, at least 2.

    Returns:
        rho, a tensor if p is one.

    Example:
        >>> lp_exponent(3.0)
        0.5
    """
    return (p - 2) / (p - 1)


def lp_weights(size: Tensor, p: float | Tensor, eps: float | Tensor) -> Tensor:
    r"""What every entry is multiplied by: :math:`(|x| + \epsilon)^{-\rho}` with `lp_exponent`'s rho.

    The power is taken as ``exp2(-rho log2(...))``, which is faster than ``pow``; its relative error is about 1e-6 in
    float32. Give sizes in float32 at least: in half precision eps would be zero.

    Args:
        size: Sizes |x|, any shape.
        p: Order of the norm.
        eps: Keeps the weight of zero finite.

    Returns:
        Weights of the same shape; in the memory of the sizes, which are lost, where autograd does not need them.
    """
    if torch.is_grad_enabled():
        return torch.exp2(-lp_exponent(p) * torch.log2(size + eps))
    return size.add_(eps).log2_().mul_(-lp_exponent(p)).exp2_()


def lp_direction(x: Tensor, p: float | Tensor, eps: float) -> Tensor:
    r"""The direction of steepest ascent in the l_p norm of a gradient: :math:`v = x / (|x| + \epsilon)^\rho`.

    Up to eps, ``<x, v> = |x|_q |v|_p`` with q = p / (p - 1): equality in Hoelder's inequality, so no other direction
    with the same l_p norm gains more. ``v(c x) = c^(1 - rho) v(x)``.

    Args:
        x: Gradient, any shape, real.
        p: Order of the norm: 2 gives x itself, large p its signs.
        eps: Keeps the weight of zero finite; zeros stay zeros.

    Returns:
        v, of x's shape and dtype.

    Example:
        >>> lp_direction(torch.tensor([4.0, 0.0, -9.0]), 3.0, 1e-12)
        tensor([ 2.,  0., -3.])
    """
    if not isinstance(p, Tensor) and p == 2:
        return x
    size = x.to(torch.promote_types(x.dtype, torch.float32)).abs()
    return (lp_weights(size, p, eps) * x).to(x.dtype)
