"""Ordinary attention as a layer, for the twins of models with softmax-free attention."""

from torch import Tensor, nn
from torch.nn import functional as F

from steepest._validation import check_integer
from steepest.errors import InvalidOptionError

__all__ = ["SoftmaxAttention"]


class SoftmaxAttention(nn.Module):
    """Ordinary multi-head self-attention, called as `SoftmaxFreeAttention` is: the other half of a comparison.

    Differs from `torch.nn.MultiheadAttention`: three layers for queries, keys and values in place of a packed weight,
    `batch_first` always, no masks.

    Args:
        embed_dim: Features of a token.
        num_heads: Heads; they divide `embed_dim`.

    Raises:
        InvalidOptionError: If a number is no integer above 0, or the heads do not divide the features.

    Example:
        >>> import torch
        >>> SoftmaxAttention(32, 2)(torch.zeros(4, 10, 32))[0].shape
        torch.Size([4, 10, 32])
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        check_integer("embed_dim", embed_dim, low=1)
        if embed_dim % check_integer("num_heads", num_heads, low=1):
            raise InvalidOptionError(
                f"num_heads={num_heads} does not divide embed_dim={embed_dim}: give one that does."
            )
        self.num_heads = num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim)
        self.k_proj = nn.Linear(embed_dim, embed_dim)
        self.v_proj = nn.Linear(embed_dim, embed_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(self, tokens: Tensor, *, size: tuple[int, int] | None = None) -> tuple[Tensor, None]:
        """Attend.

        Args:
            tokens: `[B, n, embed_dim]`.
            size: Height and width of the map whose rows the tokens are; it makes no difference here.

        Returns:
            The outputs, `[B, n, embed_dim]`, and None in the place of attention weights.
        """
        query, key, value = (
            projection(tokens).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out_proj(mixed.transpose(1, 2).flatten(2)), None
