"""Parts of the SOFT models: patch embeddings, position embeddings and the two kinds of blocks."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.inverses import Inverse
from steepest.nn.resnet import Norm, normalisation

__all__ = ["DropSamples", "Positions", "SoftmaxBlock", "SoftmaxFreeBlock", "patch_embedding", "resize_positions"]

# Features of the MLP of every block, per feature of a token.
_WIDENING = 4
# LayerNorm's epsilon in the blocks with softmax attention.
SOFTMAX_EPS = 1e-6


def patch_embedding(norm: Norm, before: int, after: int, *, stem: bool) -> nn.Sequential:
    """Convolutions that halve a map (three of them that quarter the image, for the stem), each with its normalisation.

    Args:
        norm: "group" or "batch".
        before: Channels of the map.
        after: Features of a token.
        stem: Whether this is the first one, on the image.

    Returns:
        A sequence of convolution, normalisation and ReLU. Sizes are halved upwards: no row or column is left out.
    """
    inner = math.ceil(after / 2)
    steps = [(before, inner, 2), (inner, inner, 1), (inner, after, 2)] if stem else [(before, after, 2)]
    layers: list[nn.Module] = []
    for width_in, width_out, stride in steps:
        convolution = nn.Conv2d(width_in, width_out, 3, stride=stride, padding=1)
        layers += [convolution, normalisation(norm, width_out), nn.ReLU()]
    return nn.Sequential(*layers)


def resize_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings of a map at another size, by bilinear interpolation between the centres of its cells.

    Args:
        positions: `[1, e + h * w, d]`: those of e tokens that belong to no place, which stay, then those of the map.
        old: Its height and width.
        new: The height and width wanted.

    Returns:
        `[1, e + h' * w', d]`; `positions` itself where the sizes agree.
    """
    if old == new:
        return positions
    count = math.prod(old)
    extra = positions.shape[1] - count
    maps = positions[:, extra:].transpose(1, 2).unflatten(2, old)
    resized = F.interpolate(maps, size=new, mode="bilinear", align_corners=False).flatten(2).transpose(1, 2)
    return torch.cat([positions[:, :extra], resized], dim=1) if extra else resized


class Positions(nn.Module):
    """Learned position embeddings, added to the tokens of a map, and interpolated where the map has another size.

    Args:
        size: Height and width of the map that the embeddings are made for.
        dim: Features of a token.
        extra: Tokens before those of the map, with embeddings of their own.
    """

    def __init__(self, size: tuple[int, int], dim: int, extra: int = 0) -> None:
        super().__init__()
        self.size = size
        self.weight = nn.Parameter(torch.empty(1, extra + math.prod(size), dim))
        nn.init.trunc_normal_(self.weight, std=0.02)

    def extra_repr(self) -> str:
        """Name the size."""
        return f"{tuple(self.weight.shape)}, size={self.size}"

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Add the embeddings.

        Args:
            tokens: `[B, e + h * w, d]`.
            size: Height and width of their map.

        Returns:
            A tensor like `tokens`.
        """
        return tokens + resize_positions(self.weight, self.size, size)


class DropSamples(nn.Module):
    """Stochastic depth (1603.09382): in training, what a branch adds is dropped whole for some samples.

    Args:
        rate: Probability that a sample's part is dropped. What stays is divided by 1 - rate.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def extra_repr(self) -> str:
        """Name the rate."""
        return f"rate={self.rate:g}"

    def forward(self, branch: Tensor) -> Tensor:
        """Drop.

        Args:
            branch: `[B, ...]`.

        Returns:
            A tensor like `branch`.
        """
        if not self.training or self.rate == 0:
            return branch
        kept = branch.new_empty(len(branch), *[1] * (branch.ndim - 1)).bernoulli_(1 - self.rate)
        return branch * (kept / (1 - self.rate))


class SoftmaxFreeBlock(nn.Module):
    """Softmax-free attention and an MLP, each added to its input and normalised behind the sum.

    Args:
        dim: Features of a token.
        heads: Heads of the attention.
        landmark_stride: Tokens per landmark, in either direction.
        value_kernel_size: Size of the convolution over the values.
        normalize: Symmetric normalisation of the kernel.
        inverse: How the landmarks' kernel is inverted; None for Cholesky.
        drop: Probability that an entry of what a branch adds is dropped in training.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        landmark_stride: int,
        value_kernel_size: int,
        normalize: bool,
        inverse: Inverse | None,
        drop: float,
    ) -> None:
        super().__init__()
        self.attention = SoftmaxFreeAttention(
            dim,
            heads,
            landmark_stride=landmark_stride,
            dims=2,
            value_kernel_size=value_kernel_size,
            normalize=normalize,
            learn_bandwidth=False,
            inverse=inverse,
        )
        self.norm1 = nn.LayerNorm(dim)
        self.linear1 = nn.Linear(dim, _WIDENING * dim)
        self.linear2 = nn.Linear(_WIDENING * dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.drop = nn.Dropout(drop)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """Compute the block.

        Args:
            tokens: `[B, h * w, dim]`.
            size: Height and width of their map.

        Returns:
            A tensor like `tokens`.
        """
        mixed, _ = self.attention(tokens, size=size)
        tokens = self.norm1(tokens + self.drop(mixed))
        hidden = F.gelu(self.linear1(tokens), approximate="tanh")
        out: Tensor = self.norm2(tokens + self.drop(self.linear2(hidden)))
        return out


class SoftmaxBlock(nn.Module):
    """Softmax attention and an MLP, each on its normalised input and added to it.

    Args:
        dim: Features of a token.
        heads: Heads of the attention.
        drop: Probability that what a branch adds is dropped for a sample in training.
    """

    def __init__(self, dim: int, heads: int, *, drop: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim, eps=SOFTMAX_EPS)
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)  # keys, then values
        self.out_proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim, eps=SOFTMAX_EPS)
        self.linear1 = nn.Linear(dim, _WIDENING * dim)
        self.linear2 = nn.Linear(_WIDENING * dim, dim)
        self.drop = DropSamples(drop)

    def forward(self, tokens: Tensor, _: tuple[int, int]) -> Tensor:
        """Compute the block.

        Args:
            tokens: `[B, n, dim]`.
            _: Height and width of their map, which this attention does not need.

        Returns:
            A tensor like `tokens`.
        """
        tokens = tokens + self.drop(self._attend(self.norm1(tokens)))
        hidden = F.gelu(self.linear1(self.norm2(tokens)))
        return tokens + cast(Tensor, self.drop(self.linear2(hidden)))

    def _attend(self, tokens: Tensor) -> Tensor:
        parts = [self.q_proj(tokens), *self.kv_proj(tokens).chunk(2, dim=-1)]
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))
        return out
