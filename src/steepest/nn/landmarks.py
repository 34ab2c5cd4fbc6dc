"""Landmarks: a few points that stand for all tokens."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from steepest._validation import check_integer
from steepest.errors import InvalidOptionError
from steepest.linalg.gaussian import no_autocast

__all__ = ["average_landmarks", "check_size", "pad_to_multiple", "widened"]


def widened(tensor: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return tensor.float() if tensor.dtype in {torch.float16, torch.bfloat16} else tensor


def check_size(size: tuple[int, int] | None, count: int) -> None:
    """Refuse the size of a map that is not one of so many tokens."""
    if size is not None and (len(size) != 2 or min(size) < 1 or math.prod(size) != count):
        raise InvalidOptionError(
            f"size={tuple(size)} for {count} tokens: give the height and width of the map whose rows the tokens are, "
            "with that product."
        )


def pad_to_multiple(maps: Tensor, stride: int) -> Tensor:
    """Pad the last dimensions with zeros to whole strides.

    Args:
        maps: `[B, C, n]` or `[B, C, H, W]`.
        stride: Tokens per step in each direction.

    Returns:
        The maps, padded at the end.
    """
    missing = [(-size) % stride for size in maps.shape[2:]]
    return F.pad(maps, [number for size in reversed(missing) for number in (0, size)]) if any(missing) else maps


def average_landmarks(
    tokens: Tensor,
    num_landmarks: int,
    *,
    key_padding_mask: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Means of the tokens over parts of nearly equal length, or over the cells of a grid.

    A sequence of n tokens is cut into min(m, n) runs whose lengths differ by 1 at most; no token is left out, and
    tokens under the mask count nowhere: the result is that of the sequence without them. A map of `size` is cut into a
    grid of at most m cells, as square as it can be; the mask empties cells there and moves none.

    Args:
        tokens: `[..., n, d]`.
        num_landmarks: m.
        key_padding_mask: Boolean, True for tokens that are not there, with the shape of the tokens without d up to
            broadcasting.
        size: Height and width of a map whose rows the tokens are, one after the other.

    Returns:
        Landmarks `[..., m', d]`, half precision widened to float32, and which of them are not there, boolean
        `[..., m']` or None for none.

    Raises:
        InvalidOptionError: If the number is no integer above 0, or the size is not that of n tokens.

    Example:
        >>> average_landmarks(torch.arange(6.0).view(6, 1), 3)[0].flatten()
        tensor([0.5000, 2.5000, 4.5000])
    """
    check_integer("num_landmarks", num_landmarks, low=1)
    tokens = widened(tokens)
    count = tokens.shape[-2]
    check_size(size, count)
    if size is None and key_padding_mask is None and num_landmarks <= count and count % num_landmarks == 0:
        return tokens.unflatten(-2, (num_landmarks, count // num_landmarks)).mean(-2), None
    if size is None:
        parts, present = min(num_landmarks, count), _runs(count, num_landmarks, key_padding_mask, tokens.device)
    else:
        parts, present = _cells(size, num_landmarks, tokens.device)
    weights = (present.unsqueeze(-1) == torch.arange(parts, device=tokens.device)).to(tokens.dtype)  # [..., n, m]
    if key_padding_mask is not None:
        weights = weights * ~key_padding_mask.unsqueeze(-1)
        tokens = tokens.masked_fill(key_padding_mask.unsqueeze(-1), 0.0)  # they may hold anything, NaN included
    members = weights.sum(-2)
    with no_autocast(tokens.device):
        landmarks = weights.mT @ tokens / members.clamp(min=1.0).unsqueeze(-1)
    return landmarks, None if key_padding_mask is None else members == 0


def _runs(count: int, num_landmarks: int, mask: Tensor | None, device: torch.device) -> Tensor:
    """Number of the run of every token, by its place among the tokens that are there."""
    if mask is None:
        return torch.arange(count, device=device) * min(num_landmarks, count) // max(count, 1)
    present = ~mask
    place = present.cumsum(-1) - 1
    total = present.sum(-1, keepdim=True)
    return place * total.clamp(max=num_landmarks) // total.clamp(min=1)


def _cells(size: tuple[int, int], num_landmarks: int, device: torch.device) -> tuple[int, Tensor]:
    """Number of cells, and the cell of every token of a map."""
    height, width = size
    rows = min(height, num_landmarks, max(1, round(math.sqrt(num_landmarks * height / max(width, 1)))))
    columns = max(1, min(width, num_landmarks // rows))
    row = torch.arange(height, device=device) * rows // max(height, 1)
    column = torch.arange(width, device=device) * columns // max(width, 1)
    return rows * columns, (row.unsqueeze(1) * columns + column).flatten()
