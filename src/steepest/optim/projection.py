"""The orthogonal correction of FOP: two gradients and an inner product, whatever the curvature behind it."""

from dataclasses import dataclass
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
    """What `project` found. All but two members are 0-dimensional tensors on the gradients' device.

    Args:
        coordinates: Coordinates of ``g_comb = g_avg + beta g_perp``.
        perpendicular: Coordinates of ``g_perp = g_diff - s g_avg``.
        s: Share of g_avg in g_diff.
        beta: Weight of g_perp, 0 where the gate is closed. Its sign and size depend on how g_diff was written.
        eta: Step size of the quadratic model along ``M^-1 g_comb``.
        r: Squared cosine of g_avg and g_perp in the inverse of M, in [0, 1]: 0 where FOP is KFAC.
        correction: ``|beta g_perp| / |g_avg|`` in the metric of s. In the inverse of M it is the root of r.
        gate: Whether g_perp was used (bool); False where it is rounding.
    """

    coordinates: Tensor
    perpendicular: Tensor
    s: Tensor
    beta: Tensor
    eta: Tensor
    r: Tensor
    correction: Tensor
    gate: Tensor


def project(mean: Placed, difference: Placed, weights: Tensor, *, total: Total = "mean") -> Projection:
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

    Where ``|g_diff| / |g_avg|`` or ``|g_perp| / |g_diff|`` is below the root of the precision in the metric of s,
    g_perp is rounding: the gate closes, beta is 0 and g_comb is g_avg, bit by bit. Nothing here waits for the device.

    Differs from the paper: the gate; the mean as total by default, which makes equal gradients a KFAC step.

    Args:
        mean: ``g_avg = (g1 + g2) / 2``; its image decides in which metric s is taken.
        difference: ``g_diff = g1 - g2``, placed likewise.
        weights: W of the inverse of M; broadcasts to the coordinates.
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
        >>> found = project(block.place((g1 + g2) / 2, 0.0), block.place(g1 - g2, 0.0), block.inverse_weights(0.0))
        >>> round(float(found.s), 4), round(float(found.beta), 4), round(float(found.r), 4)
        (0.4, 0.5769, 0.6923)
    """
    check_choice("total", total, TOTALS)
    # Numbers near 1: g_comb does not depend on the scale of the difference, and squares of huge gradients overflow.
    mean_size, difference_size = _size(mean.coordinates), _size(difference.coordinates)
    a, d = _divided(mean, mean_size), _divided(difference, difference_size)
    aa, dd = a.metric_dot(a), d.metric_dot(d)
    s = _ratio(d.metric_dot(a), aa)
    perp = _minus(d, s, a)
    pp = perp.metric_dot(perp)
    weighted = weights * perp.coordinates
    cross, inverse_pp = inner(weighted, a.coordinates), inner(weighted, perp.coordinates)
    inverse_aa = inner(weights * a.coordinates, a.coordinates)
    eps = torch.finfo(aa.dtype).eps
    gate = (difference_size * dd.sqrt() > eps**0.5 * mean_size * aa.sqrt()) & (pp > eps * dd)
    # A form that overflowed or vanished decides nothing either; NaN compares False.
    for form in (inverse_aa, inverse_pp):
        gate = gate & (form > 0) & (form < torch.inf)
    beta = torch.where(gate, cross / inverse_pp, 0)
    r = torch.where(gate, beta * (cross / inverse_aa), 0).clamp(0, 1)
    eta = (1 + r) / (1 + 3 * r)
    return Projection(
        coordinates=torch.where(gate, mean.coordinates + (beta * mean_size) * perp.coordinates, mean.coordinates),
        perpendicular=difference_size * perp.coordinates,
        s=_bounded(s * difference_size / mean_size),
        beta=torch.where(gate, _bounded(beta * (mean_size / difference_size)), 0),
        eta=2 * eta if total == "sum" else eta,
        r=r,
        correction=torch.where(gate, _bounded(beta.abs() * _ratio(pp, aa).sqrt()), 0),
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

    In an eigenbasis that takes two matrix products more than KFAC's four; with Cholesky six more.

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
    damped = metric == "damped"
    average, spread = (block.place(gradient, damping, damped=damped) for gradient in (mean, difference))
    weights = block.inverse_weights(damping)
    found = project(average, spread, weights, total=total)
    return block.direction(found.eta * (weights * found.coordinates)), found


def _size(tensor: Tensor) -> Tensor:
    """Return the largest absolute value, at least in float32; 1 for zeros."""
    low, high = tensor.aminmax()  # ten times faster on the CPU than the infinity norm, and no temporary
    size = torch.maximum(-low, high)
    return torch.where(size > 0, size, 1).to(torch.promote_types(tensor.dtype, torch.float32))


def _divided(placed: Placed, size: Tensor) -> Placed:
    """Divide a placed gradient, at least in float32."""
    coordinates, image = placed.coordinates.to(size.dtype) / size, placed.image.to(size.dtype) / size
    same = placed.vector is placed.coordinates
    return Placed(coordinates, coordinates if same else placed.vector.to(size.dtype) / size, image)


def _minus(placed: Placed, factor: Tensor, other: Placed) -> Placed:
    """Return ``placed - factor * other``."""
    coordinates = torch.addcmul(placed.coordinates, factor, other.coordinates, value=-1)
    same = placed.vector is placed.coordinates
    vector = coordinates if same else torch.addcmul(placed.vector, factor, other.vector, value=-1)
    return Placed(coordinates, vector, torch.addcmul(placed.image, factor, other.image, value=-1))


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Divide two finite numbers; 0 where they are not, or where the denominator is not positive."""
    return torch.where(denominator > 0, (numerator / denominator).nan_to_num(nan=0, posinf=0, neginf=0), 0)


def _bounded(number: Tensor) -> Tensor:
    """Bring infinity to the largest finite number: these are reports, and nothing is computed from them."""
    limit = torch.finfo(number.dtype).max
    return number.clamp(-limit, limit)
