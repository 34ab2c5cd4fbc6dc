"""The SOFT models for images (arXiv 2110.11945, 2207.03341): softmax-free attention in all stages but the last."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from steepest._validation import check_choice, check_integer, check_real
from steepest.errors import InvalidOptionError
from steepest.nn.inverses import Inverse
from steepest.nn.resnet import Norm
from steepest.nn.soft_layers import SOFTMAX_EPS, Positions, SoftmaxBlock, SoftmaxFreeBlock, patch_embedding

__all__ = ["SOFT", "soft_huge", "soft_large", "soft_medium", "soft_small", "soft_tiny"]


class _Stage(nn.Module):
    """A patch embedding, positions and blocks; with a class token before the others if it is the last stage."""

    def __init__(
        self, embedding: nn.Module, positions: Positions, blocks: Sequence[nn.Module], dropout: float, *, last: bool
    ) -> None:
        super().__init__()
        self.embedding = embedding
        self.class_token = nn.Parameter(torch.empty(1, 1, positions.weight.shape[-1])) if last else None
        if self.class_token is not None:
            nn.init.trunc_normal_(self.class_token, std=0.02)
        self.positions = positions
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Tokens after the blocks, and the height and width of their map."""
        maps = self.embedding(maps)
        size = (maps.shape[2], maps.shape[3])
        tokens = maps.flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat([self.class_token.expand(len(tokens), -1, -1), tokens], dim=1)
        tokens = self.dropout(self.positions(tokens, size))
        for block in self.blocks:
            tokens = block(tokens, size)
        return tokens, size


class SOFT(nn.Module):
    r"""A vision transformer whose attention is softmax-free in all stages but the last, for images of any size.

    A stage halves the map (the first one quarters the image), adds position embeddings and applies its blocks. The
    blocks of the last stage are ordinary ones with softmax attention, on a map 32 times smaller than the image and a
    class token, whose features a linear layer turns into scores. The defaults are those of `soft_tiny`. Weights of
    linear layers, positions and class token are drawn from a truncated normal distribution of width 0.02,
    convolutions keep torch's default, as published.

    Images need not have `image_size`. Position embeddings are made for it and interpolated for others (bilinearly),
    maps of odd size are padded within the attention, and no row or column is left out. Landmarks are a convolution
    with a fixed stride, so that their number m grows with the image: 49 at 224 x 224, 1024 at 1024 x 1024, 1 at
    32 x 32. Factorising their kernel takes :math:`O(m^3)`. For images much larger or smaller than published give
    other `landmark_strides`, such as 2, 1, 1 for 32 x 32: 16, 16 and 4 landmarks. `torch.compile` takes one image
    size at a time (`dynamic=False`).

    With `norm="group"` samples do not interact, so that `steepest.Capture` gives exact per-sample gradients.
    `norm="batch"` is the published BatchNorm in the patch embeddings: in training mode it mixes the samples, and
    `steepest.Capture` refuses it.

    Differs from the authors' code: a Cholesky solve in place of Newton's iteration (see `inverse`), so that the
    output for an image does not depend on the others; odd maps are padded and not cut.

    Args:
        in_channels: Channels of the images.
        num_classes: Scores put out per image.
        image_size: Height and width, or both in one, that position embeddings are made for.
        dims: Features of a token in every stage; at least two stages.
        heads: Heads of the attention in every stage.
        depths: Blocks of every stage.
        landmark_strides: Tokens per landmark in either direction, for every stage but the last.
        value_kernel_sizes: Sizes, odd, of the convolutions over the values, for every stage but the last.
        normalize: Symmetric normalisation of the kernel (2207.03341).
        inverse: How the landmarks' kernel is inverted: `CholeskyInverse()` by default, or `NewtonInverse(...)`.
        norm: "batch" or "group", in the patch embeddings.
        dropout: Probability that an entry of a token is dropped where it enters a stage's blocks.
        drop_path: Probability that what a branch adds is dropped in the last block; it rises linearly from 0 in the
            first. Entries are dropped one by one in softmax-free blocks and whole samples' branches in the last stage,
            as published (the authors' default is 0.1).

    Raises:
        InvalidOptionError: If an option is impossible, or the stages' options differ in length.

    Reference: arXiv 2110.11945; 2207.03341, symmetric normalisation.

    Example:
        >>> model = SOFT(3, 10, dims=(32, 64), heads=(1, 2), depths=(1, 1), landmark_strides=(2,),
        ...              value_kernel_sizes=(3,), image_size=32, norm="group")
        >>> model(torch.zeros(2, 3, 32, 32)).shape, model(torch.zeros(1, 3, 45, 30)).shape
        (torch.Size([2, 10]), torch.Size([1, 10]))
    """

    def __init__(
        self,
        in_channels: int = 3,
        num_classes: int = 1000,
        *,
        image_size: int | tuple[int, int] = 224,
        dims: Sequence[int] = (64, 128, 320, 512),
        heads: Sequence[int] = (2, 4, 10, 16),
        depths: Sequence[int] = (1, 2, 3, 2),
        landmark_strides: Sequence[int] = (8, 4, 2),
        value_kernel_sizes: Sequence[int] = (9, 5, 3),
        normalize: bool = False,
        inverse: Inverse | None = None,
        norm: Norm = "batch",
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        check_integer("in_channels", in_channels, low=1)
        check_integer("num_classes", num_classes, low=1)
        check_choice("norm", norm, ("batch", "group"))
        check_real("dropout", dropout, low=0.0, high=1.0, open_high=True)
        check_real("drop_path", drop_path, low=0.0, high=1.0, open_high=True)
        _check_stages(dims, heads, depths, landmark_strides, value_kernel_sizes)
        size = _image_size(image_size)
        self.in_channels, self.norm_kind, self.depths = in_channels, norm, tuple(depths)
        count, rates = len(dims), iter(_rising(drop_path, sum(depths)))
        stages = []
        for i, (before, dim) in enumerate(zip((in_channels, *dims), dims, strict=False)):
            last = i == count - 1
            size = _halved(size if i else _halved(size))
            blocks: list[nn.Module] = [
                SoftmaxBlock(dim, heads[i], drop=next(rates))
                if last
                else SoftmaxFreeBlock(
                    dim,
                    heads[i],
                    landmark_stride=landmark_strides[i],
                    value_kernel_size=value_kernel_sizes[i],
                    normalize=normalize,
                    inverse=inverse,
                    drop=next(rates),
                )
                for _ in range(depths[i])
            ]
            embedding = patch_embedding(norm, before, dim, stem=i == 0)
            stages.append(_Stage(embedding, Positions(size, dim, extra=int(last)), blocks, dropout, last=last))
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1], eps=SOFTMAX_EPS)
        self.head = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the scores.

        Args:
            images: `[B, C, H, W]`.

        Returns:
            `[B, num_classes]`.

        Raises:
            InvalidOptionError: If the images have another shape.
        """
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise InvalidOptionError(
                f"images have the shape {tuple(images.shape)}: give [B, {self.in_channels}, H, W]."
            )
        *stages, last = self.stages
        maps = images
        for stage in stages:
            tokens, size = stage(maps)
            maps = tokens.transpose(1, 2).unflatten(2, size)
        tokens, _ = last(maps)
        scores: Tensor = self.head(self.norm(tokens[:, 0]))
        return scores


def _halved(size: tuple[int, int]) -> tuple[int, int]:
    """Size of a map behind a convolution of 3 x 3 with stride 2 and padding 1."""
    return math.ceil(size[0] / 2), math.ceil(size[1] / 2)


def _rising(rate: float, count: int) -> list[float]:
    """Numbers from 0 to the rate, with equal steps."""
    return [rate * i / max(count - 1, 1) for i in range(count)]


def _image_size(size: Any) -> tuple[int, int]:
    both = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(both) != 2:
        raise InvalidOptionError(f"image_size={size!r}: give the height and width, or one number for both.")
    for number in both:
        check_integer("image_size", number, low=1)
    return cast(tuple[int, int], both)


def _check_stages(
    dims: Sequence[int],
    heads: Sequence[int],
    depths: Sequence[int],
    strides: Sequence[int],
    kernels: Sequence[int],
) -> None:
    count = len(dims)
    if count < 2 or not len(heads) == len(depths) == count or not len(strides) == len(kernels) == count - 1:
        raise InvalidOptionError(
            f"dims={tuple(dims)}, heads={tuple(heads)}, depths={tuple(depths)}, landmark_strides={tuple(strides)}, "
            f"value_kernel_sizes={tuple(kernels)}: give one of the first three for every stage, at least two stages, "
            "and one of the last two for every stage but the last."
        )
    for name, values in (("dims", dims), ("heads", heads), ("depths", depths)):
        for i, value in enumerate(values):
            check_integer(f"{name}[{i}]", value, low=1)
    for i, (dim, number) in enumerate(zip(dims, heads, strict=True)):
        if dim % number:
            raise InvalidOptionError(f"heads[{i}]={number} does not divide dims[{i}]={dim}: give one that does.")


def _published(width: int, blocks: tuple[int, int, int, int], **options: Any) -> SOFT:
    """A published model, given the features of its third stage; heads have 32 features."""
    dims = (64, 128, width, 512)
    return SOFT(**{"dims": dims, "heads": [dim // 32 for dim in dims], "depths": blocks, **options})


def soft_tiny(*, normalize: bool = False, num_classes: int = 1000, **options: Any) -> SOFT:
    """SOFT-Tiny: 13 million parameters, 1.9 billion multiply-adds for an image of 224 x 224.

    Args:
        normalize: Symmetric normalisation of the kernel: the authors' SOFT-Tiny-Norm.
        num_classes: Scores put out per image.
        **options: Further options of `SOFT`; dims, heads and depths take the place of the published ones.

    Returns:
        The model, with fresh weights; `load_published_weights` fills in the authors'.
    """
    return _published(320, (1, 2, 3, 2), normalize=normalize, num_classes=num_classes, **options)


def soft_small(*, normalize: bool = False, num_classes: int = 1000, **options: Any) -> SOFT:
    """SOFT-Small: 24 million parameters, 3.3 billion multiply-adds.

    These published numbers are those of 7 blocks in the third stage. The authors' code has 20 there, which makes 39
    million parameters and 6.4 billion multiply-adds: `soft_small(depths=(1, 3, 20, 4))`.

    Args:
        normalize: Symmetric normalisation of the kernel: the authors' SOFT-Small-Norm.
        num_classes: Scores put out per image.
        **options: As for `soft_tiny`.

    Returns:
        The model.
    """
    return _published(320, (1, 3, 7, 4), normalize=normalize, num_classes=num_classes, **options)


def soft_medium(*, normalize: bool = False, num_classes: int = 1000, **options: Any) -> SOFT:
    """SOFT-Medium: 45 million parameters, 7.2 billion multiply-adds; options as for `soft_tiny`."""
    return _published(288, (1, 3, 29, 5), normalize=normalize, num_classes=num_classes, **options)


def soft_large(*, normalize: bool = False, num_classes: int = 1000, **options: Any) -> SOFT:
    """SOFT-Large: 64 million parameters, 11.0 billion multiply-adds; options as for `soft_tiny`."""
    return _published(320, (1, 3, 40, 5), normalize=normalize, num_classes=num_classes, **options)


def soft_huge(*, normalize: bool = False, num_classes: int = 1000, **options: Any) -> SOFT:
    """SOFT-Huge: 87 million parameters, 16.3 billion multiply-adds; options as for `soft_tiny`."""
    return _published(352, (1, 5, 49, 5), normalize=normalize, num_classes=num_classes, **options)
