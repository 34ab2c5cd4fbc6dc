"""Rows whose Gram is the generalised Gauss-Newton matrix: residuals for cross-entropy and other convex losses."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest._validation import check_choice, check_integer, check_real
from steepest.errors import ClosureError

__all__ = ["GGNLoss", "ggn_rows"]

GGNLoss = Literal["cross_entropy", "binary_cross_entropy", "squared_error", "poisson"]


class _Factors(NamedTuple):
    """Numbers without a graph: u, and L^T as a map of outputs."""

    u: Tensor
    transposed: Callable[[Tensor], Tensor]


def ggn_rows(
    outputs: Tensor,
    targets: Tensor,
    loss: GGNLoss = "cross_entropy",
    *,
    floor: float | None = None,
    samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Turn a model's outputs into residuals for ``Sven(rows="residuals")``: a Gauss-Newton step for any convex loss.

    The rows have the value u and, in the outputs f, the Jacobian :math:`L^T`, where for every sample

    .. math:: L L^T = \nabla_f^2 \ell, \qquad L u = \nabla_f \ell

    With the Jacobian J of all rows in the parameters, :math:`J^T u` is then the gradient of the summed loss and
    :math:`J^T J` its generalised Gauss-Newton matrix, so that the damped least-squares step of J and u is the damped
    Gauss-Newton (natural gradient) step. With p the probabilities, y the targets, and
    :math:`s = \sqrt{\max(h, \epsilon)}` for the diagonal h of the losses below:

    - "cross_entropy": h = p = softmax(f); :math:`L = \mathrm{diag}(s) - p s^T`, :math:`u = (p - y) / s`.
    - "binary_cross_entropy", from logits, summed over the K outputs: p = sigmoid(f), h = p (1 - p);
      :math:`L = \mathrm{diag}(s)`, :math:`u = (p - y) / s`.
    - "squared_error": :math:`\ell = |f - y|^2`, the loss of this library without a factor 1/2;
      :math:`L = \sqrt 2\, I`, :math:`u = \sqrt 2\, (f - y)`. The residuals f - y themselves give the same step without
      damping, and with half of it.
    - "poisson", of log-rates, summed: :math:`\ell = e^f - y f`, :math:`h = e^f`; :math:`L = \mathrm{diag}(s)`,
      :math:`u = (e^f - y) / s`.

    A label of probability zero would make u infinite. So h is raised to :math:`\epsilon`, the ``floor``, in s alone:
    L u is the exact gradient whatever epsilon is, no entry of u exceeds :math:`1 / \sqrt\epsilon` in classification
    (2900 in float32 by default), and L L^T is never below the Hessian, and above it by about epsilon. A larger floor
    such as 1e-2 is a damping in the outputs: where the model is sure and wrong the Hessian is nearly zero, and a step
    by it alone long.

    Rows are K times as many as samples. With ``samples=m`` there are m random combinations of them instead,
    :math:`S u` and :math:`S L^T` with S of random signs divided by :math:`\sqrt m`, drawn anew for each sample.
    Gradient and Gauss-Newton matrix are then right on average over the signs.

    The value of the rows is no loss: of a label with probability p, :math:`|u|^2 = 1/p - 1`.

    Args:
        outputs: f with graph, ``[B, K]``: class scores, logits, values or log-rates; or ``[B]`` as ``[B, 1]``, except
            for cross-entropy. Half precision is brought to float32.
        targets: y. For cross-entropy class numbers ``[B]`` or class probabilities ``[B, K]``, such as smoothed labels;
            else of the outputs' shape, for binary cross-entropy between 0 and 1, for Poisson no negative ones.
        loss: Which loss.
        floor: Smallest h in s, in (0, 1]; by default the machine epsilon of the outputs' dtype, so that L L^T is the
            Hessian to rounding. Without effect on squared errors.
        samples: How many random combinations of a sample's rows to take; None for all K rows as they are.
        generator: Source of the random signs; torch's own by default.

    Returns:
        ``[B, K]`` or ``[B, samples]``, with graph.

    Raises:
        InvalidOptionError: If an option is impossible.
        ClosureError: If outputs and targets are not of the shapes and values above.

    References:
        Generalised Gauss-Newton: Schraudolph, Neural Computation 14 (2002); Martens, arXiv 1412.1193, section 9.

    Example:
        >>> import torch, steepest as st
        >>> _ = torch.manual_seed(0)
        >>> model, x, y = torch.nn.Linear(4, 3), torch.randn(8, 4), torch.arange(8) % 3
        >>> opt = st.Sven(model, lr=1.0, rows="residuals")
        >>> capture = st.Capture(model)
        >>> with capture:
        ...     rows = st.ggn_rows(model(x), y)
        >>> rows.shape
        torch.Size([8, 3])
        >>> gradient = capture.jacobian(rows).vjp(rows.detach().flatten())["weight"]
        >>> summed = torch.nn.functional.cross_entropy(model(x), y, reduction="sum")
        >>> torch.allclose(gradient, torch.autograd.grad(summed, model.weight)[0], atol=1e-6)
        True
    """
    check_choice("loss", loss, tuple(_LOSSES))
    if floor is not None:
        check_real("floor", floor, low=0, high=1, open_low=True)
    if samples is not None:
        check_integer("samples", samples, low=1)
    f = _checked_outputs(outputs, loss)
    y = _checked_targets(targets, outputs, f, loss)
    with torch.no_grad():
        u, transposed = _LOSSES[loss](f.detach(), y, torch.finfo(f.dtype).eps if floor is None else floor)
    rows = u + transposed(f - f.detach())
    if samples is None:
        return rows
    device = f.device if generator is None else generator.device
    signs = torch.randint(2, (len(f), samples, f.shape[1]), generator=generator, device=device)
    mixing = (2 * signs - 1).to(f) / samples**0.5
    return torch.bmm(mixing, rows.unsqueeze(2)).squeeze(2)


def _cross_entropy(f: Tensor, y: Tensor, floor: float) -> _Factors:
    p = torch.softmax(f, 1)
    s = p.clamp(min=floor).sqrt()
    return _Factors((p - y) / s, lambda z: s * (z - (p * z).sum(1, keepdim=True)))


def _binary_cross_entropy(f: Tensor, y: Tensor, floor: float) -> _Factors:
    p = torch.sigmoid(f)
    s = (p * torch.sigmoid(-f)).clamp(min=floor).sqrt()
    return _Factors((p - y) / s, lambda z: s * z)


def _squared_error(f: Tensor, y: Tensor, floor: float) -> _Factors:
    del floor  # h is constant
    root = 2**0.5
    return _Factors(root * (f - y), lambda z: root * z)


def _poisson(f: Tensor, y: Tensor, floor: float) -> _Factors:
    half = torch.exp(f / 2)  # finite where the rate is not
    s = half.clamp(min=floor**0.5)
    return _Factors(half * (half / s) - y / s, lambda z: s * z)


_LOSSES: dict[str, Callable[[Tensor, Tensor, float], _Factors]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "squared_error": _squared_error,
    "poisson": _poisson,
}


def _checked_outputs(outputs: Tensor, loss: str) -> Tensor:
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        kind = f"{outputs.dtype} tensor" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ClosureError(f"ggn_rows got outputs that are a {kind}: give the model's scores as a floating tensor.")
    shapes = {2} if loss == "cross_entropy" else {1, 2}
    if outputs.ndim not in shapes or outputs.numel() == 0:
        raise ClosureError(
            f"ggn_rows got outputs of shape {tuple(outputs.shape)} for {loss}: give one row of outputs for each "
            "sample, shape (batch, K); of several positions bring those that are samples of their own to the batch, "
            "as by outputs.flatten(0, 1)."
        )
    f = outputs.float() if outputs.dtype.itemsize < 4 else outputs
    return f.unsqueeze(1) if f.ndim == 1 else f


def _checked_targets(targets: Tensor, outputs: Tensor, f: Tensor, loss: str) -> Tensor:
    """Targets of the shape of ``f``, without a graph."""
    if not isinstance(targets, Tensor):
        raise ClosureError(f"ggn_rows got targets that are a {type(targets).__name__}: give a tensor.")
    y = targets.detach()
    if loss == "cross_entropy" and not (y.is_floating_point() or y.is_complex()):
        return _one_hot(y, f)
    if y.shape != outputs.shape:
        labels = f" or class numbers of shape ({len(f)},)" if loss == "cross_entropy" else ""
        raise ClosureError(
            f"ggn_rows got targets of shape {tuple(y.shape)} for outputs of shape {tuple(outputs.shape)} and {loss}: "
            f"give targets of the outputs' shape{labels}."
        )
    y = y.to(f).reshape(f.shape)
    if loss in _RANGES:
        low, high = _RANGES[loss]
        if bool(((y < low) | (y > high)).any()):
            raise ClosureError(
                f"ggn_rows got targets between {float(y.min()):g} and {float(y.max()):g} for {loss}: its targets lie "
                f"between {low:g} and {high:g}."
            )
    if loss == "cross_entropy" and bool(((y.sum(1) - 1).abs() > 1e-2).any()):
        worst = int((y.sum(1) - 1).abs().argmax())
        raise ClosureError(
            f"ggn_rows got class probabilities that sum to {float(y[worst].sum()):g} in sample {worst}: give "
            "probabilities that sum to 1, or class numbers as integers."
        )
    return y


_RANGES = {"cross_entropy": (0.0, 1.0), "binary_cross_entropy": (0.0, 1.0), "poisson": (0.0, float("inf"))}


def _one_hot(y: Tensor, f: Tensor) -> Tensor:
    if y.shape != f.shape[:1]:
        raise ClosureError(
            f"ggn_rows got class numbers of shape {tuple(y.shape)} for outputs of shape {tuple(f.shape)}: give one for "
            f"each sample, shape ({len(f)},)."
        )
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= f.shape[1]:
        raise ClosureError(
            f"ggn_rows got class numbers from {low} to {high} for {f.shape[1]} classes: they go from 0 to "
            f"{f.shape[1] - 1}; leave samples to be ignored out of the batch."
        )
    return F.one_hot(y.long(), f.shape[1]).to(f.dtype)
