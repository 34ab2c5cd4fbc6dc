"""Softmax-free attention as a function of tensors, beside `torch.nn.functional.scaled_dot_product_attention`."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest._validation import check_real
from steepest.errors import InvalidOptionError
from steepest.linalg.gaussian import gaussian_gram, gaussian_kernel, no_autocast
from steepest.nn.fused import composed, fused, transformed
from steepest.nn.inverses import CholeskyInverse, Inverse
from steepest.nn.landmarks import average_landmarks, widened

__all__ = ["AttentionDiagnostics", "average_landmarks", "diagnose_attention", "softmax_free_attention"]

NOT_CAUSAL = (
    "Softmax-free attention cannot be causal: every token acts through landmarks that average over the whole sequence, "
    "so that no mask can hide later tokens. Use torch.nn.functional.scaled_dot_product_attention for causal models."
)
NO_PAIRS = (
    "attn_mask is for pairs of tokens, and softmax-free attention never forms the matrix of pairs: use "
    "key_padding_mask to leave out tokens, or torch.nn.functional.scaled_dot_product_attention."
)


def softmax_free_attention(
    query: Tensor,
    value: Tensor,
    landmarks: Tensor | int = 49,
    *,
    key_padding_mask: Tensor | None = None,
    landmark_padding_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    normalize: bool = True,
    inverse: Inverse | None = None,
) -> Tensor:
    r"""Attention by a Gaussian kernel of rank m, at a cost that is linear in the number of tokens.

    .. math:: \mathrm{out} = C D^{-1/2} (A + \rho I)^{-1} D^{-1/2} C^T V, \quad
        C_{ij} = e^{-s |q_i - l_j|^2 / 2}, \quad A_{ij} = e^{-s |l_i - l_j|^2 / 2}, \quad D = \mathrm{diag}(A 1)

    Queries are keys at the same time. Time is :math:`O(n m d)`, memory :math:`O(n (m + d))`. Half precision, autocast's
    too, is widened to float32 within and narrowed again at the end.

    With all tokens as landmarks, without normalisation and as the ridge goes to 0, it is the dense kernel attention
    :math:`e^{-s |q_i - q_j|^2 / 2} V`.

    Differs from `scaled_dot_product_attention`: the weights of a token do not sum to 1, and there is no causal mask.
    Differs from the papers: a Cholesky solve in place of Newton's iteration (see `NewtonInverse`); the kernel of the
    landmarks is exact, so that its factorisation exists.

    Args:
        query: `[..., n, d]`.
        value: `[..., n, e]`, with the same leading dimensions.
        landmarks: `[..., m, d]`, or their number, for averages over parts of the sequence (see `average_landmarks`).
        key_padding_mask: Boolean, True for tokens that are not there, with the shape of `query` without d up to
            broadcasting. Their outputs are 0, and no other output depends on them.
        landmark_padding_mask: The same for given landmarks, with the shape of `landmarks` without d.
        dropout_p: Probability that a token's share in a landmark is dropped. Acts whenever above 0, as in torch.
        is_causal: Must be False.
        scale: s; :math:`d^{-1/2}` by default, as for softmax attention.
        normalize: Whether D takes part (2207.03341); False is the first paper's (2110.11945).
        inverse: How A is inverted: `CholeskyInverse()` by default, or `NewtonInverse(...)`.

    Returns:
        `[..., n, e]`, in the type of `value`.

    Raises:
        InvalidOptionError: If shapes do not fit together, or an option is impossible.

    Reference: arXiv 2110.11945, equations (4), (8) and (9); 2207.03341, symmetric normalisation.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> query, value = torch.randn(2, 4, 1000, 32), torch.randn(2, 4, 1000, 32)
        >>> softmax_free_attention(query, value, 49).shape
        torch.Size([2, 4, 1000, 32])
    """
    if is_causal:
        raise InvalidOptionError(NOT_CAUSAL)
    if not torch.compiler.is_compiling():  # where it may be a symbol
        check_real("dropout_p", dropout_p, low=0.0, high=1.0, open_high=True)
    out_type = value.dtype
    with no_autocast(query.device):
        queries, points, absent, factor = _points(query, landmarks, key_padding_mask, landmark_padding_mask, scale)
        _check_value(query, value)
        values = widened(value)
        if key_padding_mask is not None:
            values = values.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
        mix = partial(_mix, absent=absent, scale=factor, normalize=normalize, inverse=inverse or CholeskyInverse())
        # The compiler fuses the plain form better than it traces the other, and torch.func needs it.
        if dropout_p or torch.compiler.is_compiling() or transformed(queries, points, values):
            out = composed(queries, points, values, mix, factor, lambda kernel: F.dropout(kernel, dropout_p))
        else:
            out = fused(queries, points, values, mix, factor)
        if key_padding_mask is not None:
            out = out.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
    return out.to(out_type)


@dataclass(frozen=True, eq=False)
class AttentionDiagnostics:
    """What tells whether softmax-free attention is well posed on some tokens.

    Args:
        condition: Condition number of the landmarks' kernel with its ridge, `[...]`. Near 1: landmarks far apart.
        residual: Relative residual of the solve, `[...]`: large for `NewtonInverse` with too few steps.
        coverage: Mean over the tokens of their kernel with the nearest landmark, `[...]`. Near 0: no token is near any
            landmark, and the output nearly 0; widen the kernel.
    """

    condition: Tensor
    residual: Tensor
    coverage: Tensor


@torch.no_grad()
def diagnose_attention(
    query: Tensor,
    landmarks: Tensor | int = 49,
    *,
    key_padding_mask: Tensor | None = None,
    landmark_padding_mask: Tensor | None = None,
    scale: float | None = None,
    inverse: Inverse | None = None,
) -> AttentionDiagnostics:
    """Condition, residual and coverage of `softmax_free_attention` for the same arguments.

    Args:
        query: `[..., n, d]`.
        landmarks: `[..., m, d]`, or their number.
        key_padding_mask: As there.
        landmark_padding_mask: As there.
        scale: As there.
        inverse: As there.

    Returns:
        The diagnostics, without gradients.

    Example:
        >>> found = diagnose_attention(torch.zeros(10, 4), 5)  # all tokens are one point
        >>> found.condition.round(), found.coverage
        (tensor(501.), tensor(1.))
    """
    inverse = inverse or CholeskyInverse()
    with no_autocast(query.device):
        queries, points, absent, factor = _points(query, landmarks, key_padding_mask, landmark_padding_mask, scale)
        kernel = _landmark_kernel(points, absent, factor)
        identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
        ridged = kernel + inverse.ridge * identity
        left = ridged @ inverse.solve(kernel, identity.expand_as(kernel)) - identity
        nearest = gaussian_kernel(queries, points, factor)
        if absent is not None:
            nearest = nearest.masked_fill(absent.unsqueeze(-2), 0.0)
        nearest = nearest.amax(-1)
        if key_padding_mask is None:
            coverage = nearest.mean(-1)
        else:
            there = (~key_padding_mask).expand_as(nearest)
            coverage = (nearest * there).sum(-1) / there.sum(-1).clamp(min=1)
        # A matrix that holds NaN makes eigvalsh fail for all.
        broken = ridged.isnan().any(-1).any(-1)
        whole = torch.where(broken[..., None, None], identity, ridged)
        values = torch.linalg.eigvalsh(whole.double() if whole.device.type != "mps" else whole)
        condition = (values[..., -1] / values[..., 0]).to(kernel.dtype).masked_fill(broken, torch.nan)
    size = kernel.shape[-1] ** 0.5
    return AttentionDiagnostics(
        condition=condition,
        residual=torch.linalg.matrix_norm(left) / size,
        coverage=coverage,
    )


def _points(
    query: Tensor,
    landmarks: Tensor | int,
    key_padding_mask: Tensor | None,
    landmark_padding_mask: Tensor | None,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor | None, float]:
    """Queries and landmarks, wide enough to compute with, which landmarks are not there, and the kernel's scale."""
    _check_query(query, key_padding_mask)
    factor = query.shape[-1] ** -0.5 if scale is None else check_real("scale", scale, low=0.0, open_low=True)
    queries = widened(query)
    if key_padding_mask is not None:
        queries = queries.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)
    if not isinstance(landmarks, Tensor):
        if landmark_padding_mask is not None:
            raise InvalidOptionError(
                "landmark_padding_mask is for given landmarks, and only their number was given: leave it out, or give "
                "the landmarks."
            )
        return queries, *average_landmarks(queries, landmarks, key_padding_mask=key_padding_mask), factor
    _check_landmarks(query, landmarks, landmark_padding_mask)
    points = widened(landmarks).to(queries.dtype)
    if landmark_padding_mask is not None:
        points = points.masked_fill(landmark_padding_mask.unsqueeze(-1), 0.0)
    return queries, points, landmark_padding_mask, factor


def _mix(
    points: Tensor, gathered: Tensor, *, absent: Tensor | None, scale: float, normalize: bool, inverse: Inverse
) -> Tensor:
    """Solve with the landmarks' kernel, normalised from both sides."""
    kernel = _landmark_kernel(points, absent, scale)
    if absent is not None:
        gathered = gathered.masked_fill(absent.unsqueeze(-1), 0.0)
    if not normalize:
        return inverse.solve(kernel, gathered)
    spread = kernel.sum(-1, keepdim=True).rsqrt()
    return spread * inverse.solve(kernel, spread * gathered)


def _landmark_kernel(points: Tensor, absent: Tensor | None, scale: float) -> Tensor:
    kernel = gaussian_gram(points, scale)
    if absent is None:
        return kernel
    # A landmark that is not there is alone: it changes neither the others' rows nor their sums.
    identity = torch.eye(kernel.shape[-1], dtype=kernel.dtype, device=kernel.device)
    return torch.where(absent.unsqueeze(-1) | absent.unsqueeze(-2), identity, kernel)


def _check_query(query: Tensor, mask: Tensor | None) -> None:
    if query.ndim < 2 or not query.is_floating_point() or 0 in query.shape[-2:]:
        raise InvalidOptionError(
            f"query is {query.dtype} of shape {tuple(query.shape)}: give floating point [..., tokens, features]."
        )
    _check_mask("key_padding_mask", mask, query)


def _check_mask(name: str, mask: Tensor | None, points: Tensor) -> None:
    if mask is None:
        return
    expected = points.shape[:-1]
    fits = mask.ndim <= len(expected) and all(
        a in {1, b} for a, b in zip(reversed(mask.shape), reversed(expected), strict=False)
    )
    if mask.dtype != torch.bool or not fits or mask.ndim == 0 or mask.shape[-1] != expected[-1]:
        raise InvalidOptionError(
            f"{name} is {mask.dtype} of shape {tuple(mask.shape)}: give booleans (True: not there) that broadcast to "
            f"{tuple(expected)}, as mask.unsqueeze(1) does for heads."
        )


def _check_landmarks(query: Tensor, landmarks: Tensor, mask: Tensor | None) -> None:
    same = landmarks.ndim == query.ndim and landmarks.shape[:-2] == query.shape[:-2]
    if not same or landmarks.shape[-1] != query.shape[-1] or landmarks.shape[-2] == 0:
        raise InvalidOptionError(
            f"landmarks have the shape {tuple(landmarks.shape)} and query has {tuple(query.shape)}: they may differ in "
            "the number of points alone, so give [..., m, d] for [..., n, d], with m at least 1."
        )
    _check_mask("landmark_padding_mask", mask, landmarks)


def _check_value(query: Tensor, value: Tensor) -> None:
    if value.shape[:-1] != query.shape[:-1] or not value.is_floating_point():
        raise InvalidOptionError(
            f"value is {value.dtype} of shape {tuple(value.shape)} and query has {tuple(query.shape)}: queries are the "
            "keys, so give one value for each of them, floating point [..., n, e]."
        )
    if (value.dtype == torch.float64) != (query.dtype == torch.float64):
        raise InvalidOptionError(f"value is {value.dtype} and query is {query.dtype}: make both float64, or neither.")
