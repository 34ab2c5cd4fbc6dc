"""Small transformers for images and for long sequences, with softmax-free attention or with softmax attention."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from steepest._validation import check_choice, check_integer
from steepest.errors import InvalidOptionError
from steepest.nn.attention import SoftmaxFreeAttention
from steepest.nn.landmarks import pad_to_multiple
from steepest.nn.softmax import SoftmaxAttention

__all__ = ["Attention", "SequenceTransformer", "VisionTransformer"]

Attention = Literal["softmax_free", "softmax"]

# Where nobody says otherwise: patches along a side of an image, at most; pixels along a side of a patch, and features
# of a head, at least; landmarks, at most, and tokens for each of them.
_MOST_PATCHES, _LEAST_PIXELS, _HEAD_FEATURES = 8, 2, 16
_MOST_LANDMARKS, _TOKENS_PER_LANDMARK = 49, 4


class _Block(nn.Module):
    """Attention and two linear layers, each behind a LayerNorm and added to its input."""

    def __init__(self, attention: nn.Module, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(dim), attention
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor, size: tuple[int, int] | None) -> Tensor:
        tokens = tokens + self.attention(self.norm1(tokens), size=size)[0]
        out: Tensor = tokens + self.mlp(self.norm2(tokens))
        return out


class _Encoder(nn.Module):
    """From embedded tokens to outputs: what both transformers have in common."""

    def __init__(
        self,
        count: int,
        out_features: int,
        *,
        dim: int,
        depth: int,
        heads: int | None,
        mlp_ratio: int,
        attention: Attention,
        num_landmarks: int | None,
        dims: Literal[1, 2],
    ) -> None:
        super().__init__()
        check_integer("out_features", out_features, low=1)
        check_integer("depth", depth, low=1)
        check_integer("mlp_ratio", mlp_ratio, low=1)
        check_choice("attention", attention, ("softmax_free", "softmax"))
        # As many heads as have 16 features each, or the next smaller number that divides the width.
        few = range(1, max(1, dim // _HEAD_FEATURES) + 1)
        chosen = max(number for number in few if dim % number == 0) if heads is None else heads
        if num_landmarks is None:
            num_landmarks = min(_MOST_LANDMARKS, max(1, count // _TOKENS_PER_LANDMARK))

        def attend() -> nn.Module:
            if attention == "softmax":
                return SoftmaxAttention(dim, chosen)
            return SoftmaxFreeAttention(dim, chosen, num_landmarks=num_landmarks, dims=dims)

        self.position = nn.Parameter(torch.randn(count, dim))
        self.blocks = nn.ModuleList(_Block(attend(), dim, mlp_ratio * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, out_features)

    def forward(self, tokens: Tensor, size: tuple[int, int] | None) -> Tensor:
        tokens = tokens + self.position
        for block in self.blocks:
            tokens = block(tokens, size)
        out: Tensor = self.head(self.norm(tokens).mean(1))
        return out


class VisionTransformer(nn.Module):
    """A small pre-norm transformer for images `[B, C, H, W]` of one size, with either attention.

    Patches by a convolution, a learned embedding of positions, blocks of attention and two linear layers, each behind
    a LayerNorm and added to its input; LayerNorm, the mean over the tokens and a linear layer. Sizes that are no
    multiple of the patch are padded with zeros. Samples do not interact, so that `steepest.Capture` gives exact
    per-sample gradients. Weights have torch's default initialisation. Positions start standard normal, as torch's
    embeddings do: small models that are trained briefly learn less from the usual deviation of 0.02.

    With `attention="softmax"` all is the same but for the attention, which has a projection to keys, dim^2 + dim
    parameters more in every block, and no learned width of the kernel, one number less for every head.

    Args:
        in_channels: Channels of the images.
        out_features: Numbers put out per image, such as one score per class.
        image_size: Height and width.
        patch_size: Side of a patch; by default the smallest, 2 or more, for which 8 patches cover each side.
        dim: Features of a token.
        depth: Number of blocks.
        heads: Heads of every attention; by default `dim // 16`, or the next smaller number that divides `dim`.
        mlp_ratio: Hidden features of a block's two linear layers over `dim`.
        attention: "softmax_free" or "softmax".
        num_landmarks: Landmarks of the softmax-free attention, cells of a grid over the patches; by default a quarter
            of the patches, 49 at most.

    Raises:
        InvalidOptionError: If a number is no integer above 0, the heads do not divide `dim`, or images of another
            shape are given.

    Reference: arXiv 2010.11929 (images as patches).

    Example:
        >>> model = VisionTransformer(3, 10, (32, 32), dim=32, depth=2)
        >>> twin = VisionTransformer(3, 10, (32, 32), dim=32, depth=2, attention="softmax")
        >>> [sum(p.numel() for p in m.parameters()) for m in (model, twin)]
        [18990, 21098]
        >>> model(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_channels: int,
        out_features: int,
        image_size: Sequence[int],
        *,
        patch_size: int | None = None,
        dim: int = 64,
        depth: int = 4,
        heads: int | None = None,
        mlp_ratio: int = 2,
        attention: Attention = "softmax_free",
        num_landmarks: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_channels", in_channels, low=1)
        check_integer("dim", dim, low=1)
        if len(image_size) != 2:
            raise InvalidOptionError(f"image_size={tuple(image_size)}: give height and width.")
        height, width = (check_integer("image_size", side, low=1) for side in image_size)
        if patch_size is None:
            patch_size = max(_LEAST_PIXELS, -(-max(height, width) // _MOST_PATCHES))
        check_integer("patch_size", patch_size, low=1)
        self.image_shape = (in_channels, height, width)
        self.patches = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        self.grid = (-(-height // patch_size), -(-width // patch_size))
        self.encoder = _Encoder(
            self.grid[0] * self.grid[1],
            out_features,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            attention=attention,
            num_landmarks=num_landmarks,
            dims=2,
        )

    def forward(self, images: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            images: `[B, C, H, W]`.

        Returns:
            `[B, out_features]`.

        Raises:
            InvalidOptionError: If the images have another shape than the one the model was made for.
        """
        _check_inputs("images", images, self.image_shape)
        maps = self.patches(pad_to_multiple(images, self.patches.stride[0]))
        outputs: Tensor = self.encoder(maps.flatten(2).transpose(1, 2), self.grid)
        return outputs


class SequenceTransformer(nn.Module):
    """A small pre-norm transformer for sequences `[B, n, features]` of one length, with either attention.

    As `VisionTransformer`, with a linear layer in the place of the patches. Softmax-free attention is linear in n,
    which is what makes thousands of tokens affordable: images as sequences of their pixels.

    Args:
        in_features: Features of a token as it is given.
        out_features: Numbers put out per sequence, such as one score per class.
        length: Number of tokens.
        dim: Features of a token inside.
        depth: Number of blocks.
        heads: As in `VisionTransformer`.
        mlp_ratio: As in `VisionTransformer`.
        attention: "softmax_free" or "softmax".
        num_landmarks: Landmarks of the softmax-free attention, runs of adjacent tokens; by default a quarter of the
            tokens, 49 at most.

    Raises:
        InvalidOptionError: If a number is no integer above 0, the heads do not divide `dim`, or sequences of another
            shape are given.

    Example:
        >>> model = SequenceTransformer(1, 10, length=784)
        >>> twin = SequenceTransformer(1, 10, length=784, attention="softmax")
        >>> [sum(p.numel() for p in m.parameters()) for m in (model, twin)]
        [40526, 42634]
        >>> model(torch.zeros(2, 784, 1)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        length: int,
        *,
        dim: int = 32,
        depth: int = 2,
        heads: int | None = None,
        mlp_ratio: int = 2,
        attention: Attention = "softmax_free",
        num_landmarks: int | None = None,
    ) -> None:
        super().__init__()
        check_integer("in_features", in_features, low=1)
        check_integer("length", length, low=1)
        check_integer("dim", dim, low=1)
        self.sequence_shape = (length, in_features)
        self.embed = nn.Linear(in_features, dim)
        self.encoder = _Encoder(
            length,
            out_features,
            dim=dim,
            depth=depth,
            heads=heads,
            mlp_ratio=mlp_ratio,
            attention=attention,
            num_landmarks=num_landmarks,
            dims=1,
        )

    def forward(self, sequences: Tensor) -> Tensor:
        """Compute the outputs.

        Args:
            sequences: `[B, n, features]`.

        Returns:
            `[B, out_features]`.

        Raises:
            InvalidOptionError: If the sequences have another shape than the one the model was made for.
        """
        _check_inputs("sequences", sequences, self.sequence_shape)
        outputs: Tensor = self.encoder(self.embed(sequences), None)
        return outputs


def _check_inputs(name: str, given: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(given.shape[1:]) != expected:
        raise InvalidOptionError(
            f"{name} have the shape {list(given.shape)}, and this model's embedding of positions is for "
            f"[B, {', '.join(map(str, expected))}]: give those, or make a model of the other size."
        )
