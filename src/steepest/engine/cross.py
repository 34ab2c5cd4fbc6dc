"""Products of a linear layer's rows with other rows of the same layer, in two exact forms."""

import torch
from torch import Tensor

from steepest.engine.records import accumulate_cross, column_chunks

__all__ = ["explicit_cross", "factorized_cross"]

# Inputs ``[R, S, d_in]`` and output gradients ``[R, S, d_out]`` of some rows.
Side = tuple[Tensor, Tensor]


def factorized_cross(left: Side, right: Side, bias: bool, dtype: torch.dtype, limit: int) -> Tensor:
    """``sum_st (x_ns . y_mt + 1) (g_ns . h_mt)`` without any gradient, the 1 for the bias.

    Args:
        left: Inputs x and output gradients g.
        right: Inputs y and output gradients h.
        bias: Whether the bias is differentiated.
        dtype: dtype of the products.
        limit: Bytes that the products of some rows of the left side may take.

    Returns:
        ``[R, R']``.
    """
    (x, g), (rows, shared, _), (others, theirs, _) = left, left[0].shape, right[0].shape
    y, h = (part.flatten(0, 1).to(dtype) for part in right)
    gram = y.new_empty(rows, others)
    for chunk in column_chunks(rows, 2 * shared * theirs * others * dtype.itemsize, limit):
        products = x[chunk].flatten(0, 1).to(dtype) @ y.T
        if bias:
            products += 1
        products *= g[chunk].flatten(0, 1).to(dtype) @ h.T
        gram[chunk] = products if shared == theirs == 1 else products.view(-1, shared, others, theirs).sum((1, 3))
    return gram


def explicit_cross(left: Side, right: Side, bias: bool, dtype: torch.dtype, limit: int) -> Tensor:
    """The same through per-sample gradients of some output features after others, formed in their own precision.

    Args:
        left: Inputs x and output gradients g.
        right: Inputs y and output gradients h.
        bias: Whether the bias is differentiated.
        dtype: dtype of the products.
        limit: Bytes that the gradients of some output features may take (at least one feature).

    Returns:
        ``[R, R']``.
    """
    (x, g), (y, h) = left, right
    gram = x.new_zeros(len(x), len(y), dtype=dtype)
    column_bytes = (len(x) + len(y)) * x.shape[2] * (dtype.itemsize + x.itemsize)
    for outputs in column_chunks(g.shape[2], column_bytes, limit):
        mine = torch.bmm(g[:, :, outputs].mT, x).flatten(1)
        others = torch.bmm(h[:, :, outputs].mT, y).flatten(1)
        accumulate_cross(gram, mine, others, limit)
    if bias:
        accumulate_cross(gram, g.sum(1), h.sum(1), limit)
    return gram
