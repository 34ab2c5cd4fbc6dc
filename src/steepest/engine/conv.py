"""Record of convolutions in one, two or three dimensions, with stride, padding, dilation and groups."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.engine.conv_shape import ConvShape
from steepest.engine.layout import Layout
from steepest.engine.linear import LinearRecord, cross_is_cheaper_factorized, factorized_is_cheaper
from steepest.engine.records import (
    CHUNK_BYTES,
    KroneckerFactors,
    Record,
    accumulate,
    accumulate_cross,
    as_rows,
    column_chunks,
    common_dtype,
    factors_of,
)
from steepest.engine.tape import Slot, Tape, Use, function_name, refusal

__all__ = ["ConvRecord", "ConvUse", "convolution"]


class ConvRecord(Record):
    """Inputs and output gradients of a convolution.

    Args:
        weight: Qualified name of the weight, or None if it is not differentiated.
        bias: Qualified name of the bias, or None.
        inputs: ``[R * m, in_channels, *spatial]``, m images to a row, a row's images adjacent.
        output_grads: ``[R * m, out_channels, *positions]``.
        shape: The convolution.
        num_rows: Number of rows R.
    """

    def __init__(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        output_grads: Tensor,
        shape: ConvShape,
        num_rows: int,
    ) -> None:
        self._weight, self._bias, self._shape = weight, bias, shape
        self._x, self._g = common_dtype(inputs, output_grads)
        self._like = self._g
        self.names = tuple(name for name in (weight, bias) if name is not None)
        self.num_rows = num_rows
        sizes = {weight: shape.weight_shape, bias: shape.weight_shape[:1]}
        self.shapes = {name: sizes[name] for name in self.names}

    @property
    def _merged(self) -> int:
        return len(self._x) // self.num_rows

    def _bias_grads(self) -> Tensor:
        return self._g.flatten(2).sum(2).view(self.num_rows, self._merged, -1).sum(1)

    def _patches(self, rows: slice) -> Tensor:
        """``[rows, groups, features, images and positions of a row]``."""
        merged = self._merged
        return self._shape.row_patches(self._x[rows.start * merged : rows.stop * merged], merged)

    def _weight_grads(self, max_memory: int, rows_counted: int = 0) -> Iterator[Tensor]:
        """Yield per-sample gradients ``[R, groups, channels, features]`` of some output channels after others.

        How many channels depends on ``rows_counted`` where that is more than R.
        """
        groups, features = self._shape.groups, self._shape.weight_shape[1:].numel()
        positions = self._merged * self._g[0, 0].numel()
        # rows, groups, channels, images and positions of a row
        g = self._g.flatten(2).view(self.num_rows, self._merged, groups, -1, positions // self._merged)
        g = g.permute(0, 2, 3, 1, 4).flatten(3)
        size = self._x.itemsize
        row_chunks = list(column_chunks(self.num_rows, positions * groups * features * size, max_memory))
        whole = self._patches(row_chunks[0]) if len(row_chunks) == 1 else None  # made once if they fit
        counted = max(self.num_rows, rows_counted)
        for channels in column_chunks(g.shape[2], counted * groups * features * size, max_memory):
            grads = g.new_empty(self.num_rows, groups, channels.stop - channels.start, features)
            for rows in row_chunks:
                patches = self._patches(rows) if whole is None else whole
                torch.matmul(g[rows, :, channels], patches.mT, out=grads[rows])
            yield grads

    def per_sample_grads(self) -> dict[str, Tensor]:
        """``g_n^T patches_n``."""
        grads = {}
        if self._weight is not None:
            (whole,) = self._weight_grads(1 << 62)
            grads[self._weight] = whole.reshape(self.num_rows, *self._shape.weight_shape)
        if self._bias is not None:
            grads[self._bias] = self._bias_grads()
        return grads

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T`` in the cheaper of the factorised and the materialised form."""
        rows, groups = self.num_rows, self._shape.groups
        gram = self._x.new_zeros(rows, rows, dtype=dtype)
        if self._bias is not None:
            accumulate(gram, self._bias_grads(), max_memory)
        if self._weight is None:
            return gram
        positions = self._merged * self._g[0, 0].numel()
        out_channels, features = self._shape.weight_shape[0], self._shape.weight_shape[1:].numel()
        if groups == 1 and factorized_is_cheaper(rows, positions, features, out_channels):
            return gram + self._as_linear(None).gram(dtype, max_memory)
        for grads in self._weight_grads(max_memory // 2):
            accumulate(gram, grads.view(rows, -1), max_memory)
        return gram

    def cross_gram(self, other: Record, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J K^T`` in the cheaper of the factorised and the materialised form."""
        if (
            not isinstance(other, ConvRecord)
            or (self._weight, self._bias, self._shape) != (other._weight, other._bias, other._shape)
            or self._x.dtype != other._x.dtype
        ):
            return super().cross_gram(other, dtype, max_memory)
        gram = self._x.new_zeros(self.num_rows, other.num_rows, dtype=dtype)
        if self._bias is not None:
            accumulate_cross(gram, self._bias_grads(), other._bias_grads(), max_memory)
        if self._weight is None:
            return gram
        rows = (self.num_rows, other.num_rows)
        positions = (self._merged * self._g[0, 0].numel(), other._merged * other._g[0, 0].numel())
        out_channels, features = self._shape.weight_shape[0], self._shape.weight_shape[1:].numel()
        if self._shape.groups == 1 and cross_is_cheaper_factorized(rows, positions, features, out_channels):
            return gram + self._as_linear(None).cross_gram(other._as_linear(None), dtype, max_memory)
        # The same channels of both at a time: their number must not depend on the side.
        pieces = (record._weight_grads(max_memory // 4, max(rows)) for record in (self, other))
        for mine, others in zip(*pieces, strict=True):
            accumulate_cross(gram, as_rows(mine), as_rows(others), max_memory)
        return gram

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Names, the convolution and the number of rows; inputs and output gradients."""
        return (self._weight, self._bias, self._shape, self.num_rows), (self._x, self._g)

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "ConvRecord":
        """Join them again."""
        weight, bias, shape, rows = options
        inputs, grads = tensors
        return ConvRecord(weight, bias, inputs, grads, shape, rows)

    def _as_linear(self, bias: str | None) -> LinearRecord:
        """The same layer as a linear map of its patches, positions shared; of an ungrouped convolution."""
        patches = self._patches(slice(0, self.num_rows))[:, 0].mT
        grads = self._g.flatten(2).view(self.num_rows, self._merged, self._g.shape[1], -1)
        return LinearRecord("weight", bias, patches, grads.transpose(2, 3).flatten(1, 2))

    def kronecker_factors(self, sharing: Sharing) -> KroneckerFactors | None:
        """Those of the linear map of its patches, some rows at a time."""
        if self._weight is None or self._shape.groups > 1:
            return None
        positions = self._merged * self._g[0, 0].numel()
        row_bytes = positions * (self._shape.weight_shape[1:].numel() + 1) * self._x.itemsize
        # Patches of a large batch of images take gigabytes; beyond the cache nothing is gained by larger pieces.
        parts = (self.take(rows)._columns(sharing) for rows in column_chunks(self.num_rows, row_bytes, CHUNK_BYTES))
        return factors_of(parts, self.num_rows * (1 if sharing == "reduce" else positions), self.num_rows)

    def _columns(self, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Patches ``[features (+ 1), positions]`` and output gradients ``[channels, positions]``, without groups."""
        x = self._shape.columns(self._x, ones=self._bias is not None)
        g = self._g.transpose(0, 1).flatten(1)
        if sharing == "expand":
            return x, g
        return x.unflatten(1, (self.num_rows, -1)).mean(2), g.unflatten(1, (self.num_rows, -1)).sum(2)

    def row_bytes(self) -> int:
        """Memory that the explicit gradient of one row takes while it is made, its patches included."""
        patches = self._merged * self._g[0, 0].numel() * self._shape.groups * self._shape.weight_shape[1:].numel()
        return super().row_bytes() + (patches * self._x.itemsize if self._weight is not None else 0)

    def positions(self, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Patches and output gradients of every row, as a linear layer has them."""
        if self._shape.groups > 1:
            return super().positions(sharing)
        return self._as_linear(self._bias).positions(sharing)

    def whitened(self, input_root: Tensor, grad_root: Tensor) -> Record:
        """As a linear map of its patches."""
        if self._weight is None or self._shape.groups > 1:
            return super().whitened(input_root, grad_root)
        linear = self._as_linear(self._bias).whitened(input_root, grad_root)
        return LinearRecord(self._weight, None, *linear.parts()[1])

    def summed(self) -> tuple[Tensor, ...]:
        """The layer's weight gradient, and the sum of the output gradients."""
        grads = () if self._weight is None else (self._shape.weight_grad(self._x, self._g),)
        return grads if self._bias is None else (*grads, self._bias_grads().sum(0))

    def take(self, rows: slice) -> "ConvRecord":
        """Keep some rows: views, nothing is copied."""
        merged, stop = self._merged, self.num_rows if rows.stop is None else min(rows.stop, self.num_rows)
        start = rows.start or 0
        images = slice(start * merged, stop * merged)
        return ConvRecord(self._weight, self._bias, self._x[images], self._g[images], self._shape, stop - start)

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """The layer's weight gradient with weighted output gradients."""
        w = weights.to(self._g.dtype).repeat_interleave(self._merged)
        g = self._g * w.view(-1, *[1] * (self._g.ndim - 1))
        grads = {}
        if self._weight is not None:
            grads[self._weight] = self._shape.weight_grad(self._x, g)
        if self._bias is not None:
            grads[self._bias] = g.flatten(2).sum((0, 2))
        return grads

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Inner product of the output gradients with the convolution by ``v``."""
        moved = self._g.new_zeros(())
        if self._weight is not None:
            moved = self._shape.forward(self._x, vector[self._weight].to(self._x.dtype), None)
        if self._bias is not None:
            bias = vector[self._bias].to(self._x.dtype)
            moved = moved + bias.view(-1, *[1] * (self._g.ndim - 2))
        return (moved * self._g).flatten(1).sum(1).view(self.num_rows, -1).sum(1)

    def restrict(self, index: Mapping[str, Tensor]) -> Record:
        """Keep some output channels; of a grouped convolution as explicit gradients."""
        if self._shape.groups > 1:
            return self.materialize().restrict(index)
        kept = index[self.names[0]]
        shape = replace(self._shape, weight_shape=torch.Size([len(kept), *self._shape.weight_shape[1:]]))
        g = self._g.index_select(1, kept)
        return ConvRecord(self._weight, self._bias, self._x, g, shape, self.num_rows)

    def concat_rows(self, others: Sequence[Self]) -> Self | None:
        """Stack rows of equal image sizes and numbers of images."""
        parts = [self, *others]
        if len({(p.names, p._shape, p._x.shape[1:], p._merged) for p in parts}) > 1:
            return None
        x, g = torch.cat([p._x for p in parts]), torch.cat([p._g for p in parts])
        rows = sum(p.num_rows for p in parts)
        return type(self)(self._weight, self._bias, x, g, self._shape, rows)

    def concat_shared(self, other: Self) -> Self | None:
        """A second use on images of the same size is more images to a row."""
        if (self.names, self._shape, self._x.shape[1:]) != (other.names, other._shape, other._x.shape[1:]):
            return None

        def join(mine: Tensor, theirs: Tensor) -> Tensor:
            parts = [t.unflatten(0, (self.num_rows, -1)) for t in (mine, theirs)]
            return torch.cat(parts, 1).flatten(0, 1)

        x, g = join(self._x, other._x), join(self._g, other._g)
        return type(self)(self._weight, self._bias, x, g, self._shape, self.num_rows)


class ConvUse(Use):
    """A call of `F.conv1d`, `F.conv2d` or `F.conv3d`."""

    def __init__(
        self,
        tape: Tape,
        name: str,
        x: Tensor,
        weight: Slot | None,
        bias: Slot | None,
        shape: ConvShape,
        out: Tensor,
    ) -> None:
        slots = tuple(slot for slot in (weight, bias) if slot is not None)
        super().__init__(tape, name, slots, out, x, num_lead=1)
        self._weight, self._bias, self._shape = weight, bias, shape

    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Order the images row by row."""
        x, g = (layout.canonical(t, 1).flatten(0, 1) for t in (self.inputs, output_grads))
        return self._settle(ConvRecord(self._key(self._weight), self._key(self._bias), x, g, self._shape, rows))


def convolution(
    tape: Tape,
    func: Any,
    input: Tensor,  # noqa: A002
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """Rule of the convolutions; padding modes other than zeros reach them as an input padded before."""
    w, b = tape.trained(weight), tape.trained(bias)
    slots = [slot for slot in (w, b) if slot is not None]
    if input.ndim < weight.ndim:
        raise refusal(
            function_name(func),
            slots,
            "its input has no batch dimension",
            "pass the model a batch, even of one sample",
        )
    out: Tensor = func(input, w.leaf() if w else weight, b.leaf() if b else bias, stride, padding, dilation, groups)
    shape = ConvShape.of(weight.shape, stride, padding, dilation, groups)
    tape.uses.append(ConvUse(tape, function_name(func), input, w, b, shape, out))
    return out
