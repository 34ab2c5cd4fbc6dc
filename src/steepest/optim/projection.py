"""The orthogonal correction of FOP: two gradients and an inner product, whatever the curvature behind it."""

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from steepest._validation import check_choice
from steepest.linalg.decompositions import Decomposition, Placed
from steepest.linalg.factors import inner

__all__ = ["Metric", "Projection", "Total", "project", "project_gradients"]

Metric = Literal["damped", "undamped"]
Total = Literal["mean", "sum"]
METRICS = ("damped", "undamped")
TOTALS = ("mean", "sum")


@dataclass(frozen=True, eq=False)
class Projection:
    """What `project` found. All but the first are 0-dimensional tensors on the gradients' device.

    Args:
        dual: Dual of ``g_comb = g_avg + beta g_perp`` with ``g_perp = g_diff - s g_avg``.
        s: Share of g_avg in g_diff.
        beta: Weight of g_perp, 0 where the gate is closed. Its sign and size depend on how g_diff was written.
        eta: Step size of the quadratic model along ``M^-1 g_comb``.
        r: Squared cosine of g_avg and g_perp in the inverse of M, in [0, 1]: 0 where FOP is KFAC.
        correction: ``|beta g_perp| / |g_avg|``, Euclidean. In the inverse of M it is the root of r.
        gate: Whether g_perp was used (bool); False where it is rounding.
    """

    dual: Tensor
    s: Tensor
    beta: Tensor
    eta: Tensor
    r: Tensor
    correction: Tensor
    gate: Tensor


def project(mean: Placed, difference: Placed, image: Tensor, *, total: Total = "mean") -> Projection:
    r"""Combine the mean and the difference of two gradients as FOP does (arXiv 2508.13898).

    .. math::
        s &= \frac{\langle g_{diff}, g_{avg}\rangle_M}{\langle g_{avg}, g_{avg}\rangle_M}, \qquad
            g_\perp = g_{diff} - s\, g_{avg}

        \beta^* &= \frac{g_{avg}^T M^{-1} g_\perp}{g_\perp^T M^{-1} g_\perp}, \qquad
            g_{comb} = g_{avg} + \beta^* g_\perp, \qquad
            \eta^* = \frac{g_{tot}^T M^{-1} g_{comb}}{g_{comb}^T M^{-1} g_{comb}}

    With :math:`r = \langle g_{avg}, g_\perp\rangle^2 / (|g_{avg}|^2 |g_\perp|^2)` in :math:`M^{-1}`,
    :math:`|g_{comb}| = \sqrt{1 + 3r}\, |g_{avg}|` and :math:`\eta^* = (1 + r) / (1 + 3r)`, twice that for the sum.
    Neither exchanging the two gradients nor rescaling their difference changes g_comb or eta.

    Where ``|g_diff| / |g_avg|`` or ``|g_perp| / |g_diff|`` is below the root of the precision, g_perp is rounding: the
    gate closes, beta is 0 and g_comb is g_avg, bit by bit. Nothing here waits for the device.

    Differs from the paper: the gate; the mean as total by default, which makes equal gradients a KFAC step.

    Args:
        mean: ``g_avg = (g1 + g2) / 2``, placed. Where its squares overflow the gate closes: `project_gradients` brings
            the gradients near 1 before.
        difference: ``g_diff = g1 - g2``, placed likewise.
        image: Image of ``g_avg``, which decides in which metric s is taken.
        total: g_tot: "mean" is g_avg, "sum" is g1 + g2.

    Returns:
        The combined gradient and its numbers.

    Raises:
        InvalidOptionError: If ``total`` is something else.

    Example:
        >>> import torch
        >>> from steepest.linalg.kronecker import Eigenbasis
        >>> block = Eigenbasis().decompose(torch.tensor([[1.0]]), torch.diag(torch.tensor([1.0, 4.0])), damping=0.0)
        >>> g1, g2 = torch.tensor([[2.0], [1.0]]), torch.tensor([[0.0], [1.0]])
        >>> mean, difference = block.place((g1 + g2) / 2, 0.0), block.place(g1 - g2, 0.0)
        >>> found = project(mean, difference, block.image(mean.vector, 0.0))
        >>> round(float(found.s), 4), round(float(found.beta), 4), round(float(found.r), 4)
        (0.4, 0.5769, 0.6923)
    """
    check_choice("total", total, TOTALS)
    s = _ratio(inner(difference.vector, image), inner(mean.vector, image))
    vector, dual = (
        torch.addcmul(d, s, a, value=-1) for d, a in ((difference.vector, mean.vector), (difference.dual, mean.dual))
    )
    cross, size = inner(mean.vector, dual), inner(vector, dual)
    mean_size = inner(mean.vector, mean.dual)
    euclidean = [torch.linalg.vector_norm(part) for part in (mean.vector, difference.vector, vector)]
    root = torch.finfo(s.dtype).eps ** 0.5
    gate = (euclidean[1] > root * euclidean[0]) & (euclidean[2] > root * euclidean[1])
    # A form that overflowed or vanished decides nothing either; NaN compares False.
    for form in (mean_size, size):
        gate = gate & (form > 0) & (form < torch.inf)
    beta = torch.where(gate, cross / size, 0)
    r = torch.where(gate, beta * (cross / mean_size), 0).clamp(0, 1)
    eta = (1 + r) / (1 + 3 * r)
    return Projection(
        dual=torch.where(gate, torch.addcmul(mean.dual, beta, dual), mean.dual),
        s=s,
        beta=beta,
        eta=2 * eta if total == "sum" else eta,
        r=r,
        correction=torch.where(gate, beta.abs() * _ratio(euclidean[2], euclidean[0]), 0),
        gate=gate,
    )


def project_gradients(
    block: Decomposition,
    mean: Tensor,
    difference: Tensor,
    damping: float | Tensor,
    *,
    metric: Metric = "damped",
    total: Total = "mean",
) -> tuple[Tensor, Projection]:
    r"""FOP's direction :math:`\eta^* M^{-1} g_{comb}` for one layer; see `project`.

    It takes six matrix products; KFAC takes four in an eigenbasis and two with Cholesky.

    Args:
        block: The layer's decomposed curvature.
        mean: ``(g1 + g2) / 2``, ``[n, m]``.
        difference: ``g1 - g2``, ``[n, m]``.
        damping: lambda.
        metric: In which s is taken. "undamped" is the paper's reading; only with "damped" does a large damping make
            the direction that of the plain gradient.
        total: g_tot: "mean" or "sum".

    Returns:
        The direction ``[n, m]``, to be multiplied by minus the learning rate, and the numbers.

    Raises:
        InvalidOptionError: If an option is impossible.

    Example:
        >>> import torch
        >>> from steepest.linalg.kronecker import Eigenbasis
        >>> block = Eigenbasis().decompose(torch.eye(2), torch.eye(1), damping=0.0)
        >>> direction, found = project_gradients(block, torch.tensor([[2.0, 4.0]]), torch.zeros(1, 2), damping=1.0)
        >>> direction, found.gate  # equal gradients: the KFAC step
        (tensor([[1., 2.]]), tensor(False))
    """
    check_choice("metric", metric, METRICS)
    # Near 1: squares of huge gradients overflow, and those of tiny ones vanish.
    wide = torch.promote_types(mean.dtype, torch.float32)
    up, down = _powers(mean.to(wide))
    average, spread = (block.place(gradient.to(wide) * down, damping) for gradient in (mean, difference))
    image = block.image(average.vector, damping, damped=metric == "damped")
    found = project(average, spread, image, total=total)
    found = replace(found, dual=found.dual * up)
    return block.direction(found.eta * found.dual), found


def _powers(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """Return a power of two near the largest entry, and its inverse: multiplying by them rounds nothing."""
    low, high = tensor.aminmax()  # ten times faster on the CPU than the infinity norm, and no temporary
    most = int(math.log2(torch.finfo(tensor.dtype).max)) - 3
    exponent = torch.frexp(torch.maximum(-low, high))[1].clamp(-most, most)
    one = torch.ones((), dtype=tensor.dtype, device=tensor.device)
    return torch.ldexp(one, exponent), torch.ldexp(one, -exponent)


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide two finite numbers; 0 where they are not, or where the denominator is not positive."""
    return torch.where(denominator > 0, (numerator / denominator).nan_to_num(nan=0, posinf=0, neginf=0), 0)
