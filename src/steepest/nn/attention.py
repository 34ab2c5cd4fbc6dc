"""Softmax-free attention as a layer, beside `torch.nn.MultiheadAttention`."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest._validation import check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.nn.functional import (
    NO_PAIRS,
    NOT_CAUSAL,
    AttentionDiagnostics,
    average_landmarks,
    diagnose_attention,
    softmax_free_attention,
)
from steepest.nn.fused import transformed
from steepest.nn.inverses import CholeskyInverse, Inverse
from steepest.nn.landmarks import check_size, pad_to_multiple

__all__ = ["SoftmaxFreeAttention"]

NO_WEIGHTS = (
    "need_weights=True asks for the matrix of all pairs of tokens, which softmax-free attention never forms. "
    "Pass need_weights=False; diagnose() tells how well posed the attention is."
)


class SoftmaxFreeAttention(nn.Module):
    r"""Multi-head self-attention by a Gaussian kernel of rank m, linear in the number of tokens.

    Queries, which are keys too, and values are linear in the tokens; in every head `softmax_free_attention` mixes the
    values through m landmarks; a linear layer puts the heads together. It takes the place of
    `torch.nn.MultiheadAttention` for self-attention, also within `torch.nn.TransformerEncoderLayer`. Samples of a
    batch do not interact, and every parameter is one that `steepest.Capture` can follow.

    Landmarks are averages over parts of the tokens, `num_landmarks` of them for any number of tokens; or, with
    `landmark_stride`, a convolution of that size and stride over the queries, LayerNorm and GELU, as in the papers:
    then their number grows with the tokens, and the cost is linear only for a stride that grows too. Sizes that are
    no multiple of the stride are padded with zeros; no token is left out.

    Differs from `torch.nn.MultiheadAttention`: `batch_first` is True unless told otherwise, the parameters' names, no
    attention weights, no masks of pairs, no causal mask.

    Args:
        embed_dim: Features of a token.
        num_heads: Heads; they divide `embed_dim`.
        num_landmarks: m of averaged landmarks; 49 if neither this nor `landmark_stride` is given.
        landmark_stride: Tokens (for maps: in either direction) per landmark of a convolution.
        dims: 1 for sequences, 2 for maps, whose `size` every call then tells.
        value_kernel_size: Size, odd, of a convolution over each feature of the values that is added to the output of
            its head, as in the papers; None for none.
        dropout: Probability that a token's share in a landmark is dropped in training.
        bias: Whether the linear layers have a bias.
        batch_first: Whether tokens come as `[B, n, embed_dim]`; otherwise `[n, B, embed_dim]`.
        normalize: Symmetric normalisation of the kernel (2207.03341).
        learn_bandwidth: Whether every head learns a factor of its kernel's width, 1 at first (`log_bandwidth`).
        inverse: How the landmarks' kernel is inverted: `CholeskyInverse()` by default, or `NewtonInverse(...)`.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        InvalidOptionError: If an option is impossible.

    Reference: arXiv 2110.11945, section 3; 2207.03341.

    Example:
        >>> attention = SoftmaxFreeAttention(embed_dim=256, num_heads=8, num_landmarks=49)
        >>> x = torch.randn(2, 1000, 256)
        >>> attention(x)[0].shape
        torch.Size([2, 1000, 256])
        >>> images = SoftmaxFreeAttention(64, 2, landmark_stride=7, dims=2, value_kernel_size=9)
        >>> images(torch.randn(2, 56 * 56, 64), size=(56, 56))[0].shape
        torch.Size([2, 3136, 64])
    """

    # What torch.nn.TransformerEncoderLayer asks of its attention before it would bypass it.
    in_proj_bias: None = None
    _qkv_same_embed_dim = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        num_landmarks: int | None = None,
        landmark_stride: int | None = None,
        dims: Literal[1, 2] = 1,
        value_kernel_size: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        batch_first: bool = True,
        normalize: bool = True,
        learn_bandwidth: bool = True,
        inverse: Inverse | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_integer("embed_dim", embed_dim, low=1)
        check_integer("num_heads", num_heads, low=1)
        if embed_dim % num_heads:
            raise InvalidOptionError(
                f"num_heads={num_heads} does not divide embed_dim={embed_dim}: give one that does."
            )
        if num_landmarks is not None and landmark_stride is not None:
            raise InvalidOptionError("num_landmarks and landmark_stride exclude each other: give one of them.")
        if dims not in {1, 2}:
            raise InvalidOptionError(f"dims={dims!r}: give 1 for sequences or 2 for maps.")
        if landmark_stride is None:
            num_landmarks = check_integer("num_landmarks", 49 if num_landmarks is None else num_landmarks, low=1)
        else:
            check_integer("landmark_stride", landmark_stride, low=1)
        if value_kernel_size is not None and check_integer("value_kernel_size", value_kernel_size, low=1) % 2 == 0:
            raise InvalidOptionError(f"value_kernel_size={value_kernel_size}: give an odd number.")
        self.embed_dim, self.num_heads, self.head_dim = embed_dim, num_heads, embed_dim // num_heads
        self.num_landmarks, self.landmark_stride, self.dims = num_landmarks, landmark_stride, dims
        self.dropout = check_real("dropout", dropout, low=0.0, high=1.0, open_high=True)
        self.batch_first, self.normalize = batch_first, normalize
        self.inverse = inverse or CholeskyInverse()
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.v_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, **made)
        self.log_bandwidth = nn.Parameter(torch.zeros(num_heads, **made)) if learn_bandwidth else None
        convolution: type[nn.Conv1d | nn.Conv2d] = nn.Conv1d if dims == 1 else nn.Conv2d
        self.landmark_conv: nn.Module | None = None
        if landmark_stride is not None:
            self.landmark_conv = convolution(
                self.head_dim, self.head_dim, landmark_stride, stride=landmark_stride, bias=False, **made
            )
            self.landmark_norm = nn.LayerNorm(self.head_dim, **made)
        self.value_conv: nn.Module | None = None
        if value_kernel_size is not None:
            self.value_conv = convolution(
                num_heads, num_heads, value_kernel_size, padding="same", groups=num_heads, bias=False, **made
            )

    def extra_repr(self) -> str:
        """Name the options that the children do not show."""
        landmarks = f"num_landmarks={self.num_landmarks}"
        if self.landmark_stride is not None:
            landmarks = f"landmark_stride={self.landmark_stride}"
        return (
            f"{self.embed_dim}, num_heads={self.num_heads}, {landmarks}, dims={self.dims}, dropout={self.dropout:g}, "
            f"normalize={self.normalize}, inverse={self.inverse}"
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        size: tuple[int, int] | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: `[B, n, embed_dim]`, `[n, B, embed_dim]` without `batch_first`, or `[n, embed_dim]`.
            key: None or the same tensor as `query`.
            value: What is mixed; `query` by default. Of its shape.
            key_padding_mask: `[B, n]`, or `[n]` without a batch: boolean, True for tokens that are not there; or
                float, 0 and -inf.
            need_weights: Must be False.
            attn_mask: Must be None.
            is_causal: Must be False.
            size: Height and width of the map whose rows the tokens are, for `dims=2`.

        Returns:
            The outputs, in the shape of `query`, and None in the place of attention weights.

        Raises:
            InvalidOptionError: If an argument cannot be honoured, or shapes do not fit.
        """
        if is_causal:
            raise InvalidOptionError(NOT_CAUSAL)
        if attn_mask is not None:
            raise InvalidOptionError(NO_PAIRS)
        if need_weights:
            raise InvalidOptionError(NO_WEIGHTS)
        if key is not None and key is not query:
            raise InvalidOptionError(
                "key is another tensor than query: softmax-free attention has one projection for both, so that it is "
                "self-attention only. Pass query alone, or use torch.nn.MultiheadAttention for cross-attention."
            )
        value = query if value is None else value
        self._check(query, value, size)
        batched, transposed = query.ndim == 3, query.ndim == 3 and not self.batch_first
        if transposed:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        if not batched:
            query, value = query.unsqueeze(0), value.unsqueeze(0)
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        out = self._attend(query, value, self._mask(query, key_padding_mask), size)
        if transposed:
            out = out.transpose(0, 1)
        return (out if batched else out.squeeze(0)), None

    def diagnose(
        self,
        query: Tensor,
        key_padding_mask: Tensor | None = None,
        *,
        size: tuple[int, int] | None = None,
    ) -> AttentionDiagnostics:
        """Condition, residual and coverage in every head.

        Args:
            query: As for a call.
            key_padding_mask: As for a call.
            size: As for a call.

        Returns:
            The diagnostics, each `[B, num_heads]`, without gradients.
        """
        self._check(query, query, size)
        with torch.no_grad():
            if query.ndim == 2:
                query = query.unsqueeze(0)
                key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            elif not self.batch_first:
                query = query.transpose(0, 1)
            mask = self._mask(query, key_padding_mask)
            heads = self._queries(query, mask)
            points, absent = self._landmarks(heads, mask, size)
            return diagnose_attention(
                heads,
                points,
                key_padding_mask=mask,
                landmark_padding_mask=absent,
                inverse=self.inverse,
                scale=1.0,
            )

    def _attend(self, query: Tensor, value: Tensor, mask: Tensor | None, size: tuple[int, int] | None) -> Tensor:
        heads = self._queries(query, mask)
        values = self._split(self.v_proj(_without(value, mask)))
        if mask is not None:
            values = values.masked_fill(mask.unsqueeze(-1), 0.0)
        points, absent = self._landmarks(heads, mask, size)
        mixed = softmax_free_attention(
            heads,
            values,
            points,
            key_padding_mask=mask,
            landmark_padding_mask=absent,
            dropout_p=self.dropout if self.training else 0.0,
            scale=1.0,
            normalize=self.normalize,
            inverse=self.inverse,
        )
        if self.value_conv is not None:
            mixed = mixed + self._convolved(self.value_conv, values, size)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _queries(self, query: Tensor, mask: Tensor | None) -> Tensor:
        """Queries of every head `[B, heads, n, head_dim]`, scaled so that the kernel's width is 1."""
        heads: Tensor = self._split(self.q_proj(_without(query, mask)))
        scale = self.head_dim**-0.25
        if self.log_bandwidth is None:
            heads = heads * scale
        else:  # by an elementwise product: what the engine follows sample by sample
            heads = heads * (self.log_bandwidth.neg().exp() * scale).view(-1, 1, 1)
        return heads if mask is None else heads.masked_fill(mask.unsqueeze(-1), 0.0)

    def _split(self, tokens: Tensor) -> Tensor:
        heads: Tensor = tokens.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        return heads

    def _landmarks(
        self, heads: Tensor, mask: Tensor | None, size: tuple[int, int] | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.landmark_conv is None or self.landmark_stride is None:
            return average_landmarks(heads, self.num_landmarks or 1, key_padding_mask=mask, size=size)
        batch, _, count, _ = heads.shape
        shape = (count,) if size is None else tuple(size)
        maps = heads.transpose(-1, -2).reshape(batch * self.num_heads, self.head_dim, *shape)
        maps = self.landmark_conv(pad_to_multiple(maps, self.landmark_stride))
        points = F.gelu(self.landmark_norm(maps.flatten(2).transpose(1, 2)))
        absent = None
        if mask is not None:
            there = pad_to_multiple((~mask).to(torch.float32).view(batch, 1, *shape), self.landmark_stride)
            pool = F.max_pool1d if self.dims == 1 else F.max_pool2d
            absent = pool(there, self.landmark_stride).flatten(2) == 0
        return points.unflatten(0, (batch, self.num_heads)), absent

    def _convolved(self, convolution: nn.Module, values: Tensor, size: tuple[int, int] | None) -> Tensor:
        """A convolution along the tokens, the same for all features of a head."""
        batch, heads, count, width = values.shape
        shape = (count,) if size is None else tuple(size)
        maps = values.permute(0, 3, 1, 2).reshape(batch * width, heads, *shape)
        out: Tensor = convolution(maps).view(batch, width, heads, count).permute(0, 2, 3, 1)
        return out

    def _check(self, query: Tensor, value: Tensor, size: tuple[int, int] | None) -> None:
        fits = query.ndim in {2, 3} and query.shape[-1] == self.embed_dim and value.shape == query.shape
        count = query.shape[-2 if self.batch_first or query.ndim == 2 else 0] if fits else 0
        if count == 0:
            order = "[B, n, " if self.batch_first else "[n, B, "
            raise InvalidOptionError(
                f"query has the shape {tuple(query.shape)} and value {tuple(value.shape)}: give both as {order}"
                f"{self.embed_dim}] or [n, {self.embed_dim}], with a token at least."
            )
        if (size is None) != (self.dims == 1):
            needed = "pass size=(height, width)" if self.dims == 2 else "build it with dims=2, or leave out size"
            raise InvalidOptionError(f"size={size} for attention over {self.dims} dimension(s): {needed}.")
        check_size(size, count)

    @staticmethod
    def _mask(query: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask as boolean `[B, 1, n]`."""
        if mask is None:
            return None
        if mask.shape != query.shape[:2]:
            raise InvalidOptionError(
                f"key_padding_mask has the shape {tuple(mask.shape)}: give one entry per token, "
                f"{tuple(query.shape[:2])}."
            )
        if mask.is_floating_point():
            readable = not (torch.compiler.is_compiling() or mask.is_meta or transformed(mask))
            if readable and not ((mask == 0) | mask.isneginf()).all():
                raise InvalidOptionError(
                    "key_padding_mask holds numbers other than 0 and -inf: give booleans, True for tokens not there."
                )
            mask = mask.isneginf()
        if mask.dtype != torch.bool:
            raise InvalidOptionError(f"key_padding_mask is {mask.dtype}: give booleans, True for tokens not there.")
        return mask.unsqueeze(1)


def _without(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens that are not there as zeros: what they hold, NaN included, must not reach a weight's gradient either."""
    return tokens if mask is None else tokens.masked_fill(mask.transpose(1, 2), 0.0)
