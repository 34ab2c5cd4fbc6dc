"""Record of convolutions with vector rows: the images of a sample are there once, for all of its rows."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor

from steepest.engine.conv import ConvRecord
from steepest.engine.conv_shape import ConvShape
from steepest.engine.records import Record, accumulate, accumulate_cross, column_chunks, common_dtype
from steepest.engine.vector import LinearVectorRecord, VectorRecord, vector_is_cheaper_factorized, weighted_sum

__all__ = ["ConvVectorRecord"]


class ConvVectorRecord(VectorRecord):
    """Inputs and output gradients of a convolution, K rows to a sample.

    Args:
        weight: Qualified name of the weight, or None if it is not differentiated.
        bias: Qualified name of the bias, or None.
        inputs: ``[B * m, in_channels, *spatial]``, m images to a sample, a sample's images adjacent.
        output_grads: ``[B * m, K, out_channels, *positions]``.
        shape: The convolution.
        num_samples: Number of samples B.
    """

    def __init__(
        self,
        weight: str | None,
        bias: str | None,
        inputs: Tensor,
        output_grads: Tensor,
        shape: ConvShape,
        num_samples: int,
    ) -> None:
        self._weight, self._bias, self._shape = weight, bias, shape
        self._x, self._g = common_dtype(inputs, output_grads)
        self._like = self._g
        self.names = tuple(name for name in (weight, bias) if name is not None)
        self.num_samples, self.num_components = num_samples, output_grads.shape[1]
        self.num_rows = num_samples * self.num_components
        sizes = {weight: shape.weight_shape, bias: shape.weight_shape[:1]}
        self.shapes = {name: sizes[name] for name in self.names}

    @property
    def _merged(self) -> int:
        return len(self._x) // self.num_samples

    @property
    def _positions(self) -> int:
        """Images and positions of a sample."""
        return self._merged * self._g[0, 0, 0].numel()

    def _bias_grads(self) -> Tensor:
        g = self._g.flatten(3).sum(3)
        return g.view(self.num_samples, self._merged, *g.shape[1:]).sum(1).flatten(0, 1)

    def _weight_grads(self, max_memory: int, rows_counted: int = 0) -> Iterator[Tensor]:
        """Yield explicit gradients ``[B K, groups * channels * features]`` of some output channels after others.

        How many channels depends on ``rows_counted`` where that is more than R.
        """
        groups, features = self._shape.groups, self._shape.weight_shape[1:].numel()
        samples, components, size = self.num_samples, self.num_components, self._x.itemsize
        # samples, groups, rows of a sample, channels, images and positions of a sample
        g = self._g.flatten(3).view(samples, self._merged, components, groups, -1, self._positions // self._merged)
        g = g.permute(0, 3, 2, 4, 1, 5).flatten(4)
        chunks = list(column_chunks(samples, self._positions * groups * features * size, max_memory))
        whole = self._patches(chunks[0]) if len(chunks) == 1 else None  # made once if they fit
        counted = max(self.num_rows, rows_counted)
        for channels in column_chunks(g.shape[3], counted * groups * features * size, max_memory):
            grads = g.new_empty(samples, components, groups, channels.stop - channels.start, features)
            for chunk in chunks:
                patches = self._patches(chunk) if whole is None else whole
                product = g[chunk, :, :, channels].flatten(2, 3) @ patches.mT
                grads[chunk] = product.unflatten(2, (components, -1)).transpose(1, 2)
            yield grads.view(self.num_rows, -1)

    def _patches(self, chosen: slice) -> Tensor:
        merged = self._merged
        return self._shape.row_patches(self._x[chosen.start * merged : chosen.stop * merged], merged)

    def per_sample_grads(self) -> dict[str, Tensor]:
        """``g_nk^T patches_n``."""
        grads = {}
        if self._weight is not None:
            (whole,) = self._weight_grads(1 << 62)
            grads[self._weight] = whole.view(self.num_rows, *self._shape.weight_shape)
        if self._bias is not None:
            grads[self._bias] = self._bias_grads()
        return grads

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T`` in the cheaper of the factorised and the materialised form."""
        gram = self._x.new_zeros(self.num_rows, self.num_rows, dtype=dtype)
        if self._bias is not None:
            accumulate(gram, self._bias_grads(), max_memory)
        if self._weight is None:
            return gram
        if self._factorized_is_cheaper(self):
            return gram + self._as_linear().gram(dtype, max_memory)
        for grads in self._weight_grads(max_memory // 2):
            accumulate(gram, grads, max_memory)
        return gram

    def cross_gram(self, other: Record, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J K^T`` in the cheaper of the factorised and the materialised form."""
        mine = (self._weight, self._bias, self._shape, self._x.dtype)
        if (
            not isinstance(other, ConvVectorRecord)
            or (other._weight, other._bias, other._shape, other._x.dtype) != mine
        ):
            return super().cross_gram(other, dtype, max_memory)
        gram = self._x.new_zeros(self.num_rows, other.num_rows, dtype=dtype)
        if self._bias is not None:
            accumulate_cross(gram, self._bias_grads(), other._bias_grads(), max_memory)
        if self._weight is None:
            return gram
        if self._factorized_is_cheaper(other):
            return gram + self._as_linear().cross_gram(other._as_linear(), dtype, max_memory)
        # The same channels of both at a time: their number must not depend on the side.
        rows = max(self.num_rows, other.num_rows)
        pieces = (record._weight_grads(max_memory // 4, rows) for record in (self, other))
        for left, right in zip(*pieces, strict=True):
            accumulate_cross(gram, left, right, max_memory)
        return gram

    def _factorized_is_cheaper(self, other: "ConvVectorRecord") -> bool:
        if self._shape.groups > 1:
            return False
        out_channels, features = self._shape.weight_shape[0], self._shape.weight_shape[1:].numel()
        sizes = [(r.num_samples, r.num_rows, r._positions) for r in (self, other)]
        return vector_is_cheaper_factorized(sizes[0], sizes[1], features, out_channels)

    def _as_linear(self) -> LinearVectorRecord:
        """The weight as a linear map of the patches, positions shared; of an ungrouped convolution."""
        patches = self._patches(slice(0, self.num_samples))[:, 0].mT
        g = self._g.flatten(3).view(self.num_samples, self._merged, self.num_components, self._g.shape[2], -1)
        return LinearVectorRecord("weight", None, patches, g.permute(0, 2, 1, 4, 3).flatten(2, 3))

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Names, the convolution and the number of samples; inputs and output gradients."""
        return (self._weight, self._bias, self._shape, self.num_samples), (self._x, self._g)

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "ConvVectorRecord":
        """Join them again."""
        weight, bias, shape, samples = options
        inputs, grads = tensors
        return ConvVectorRecord(weight, bias, inputs, grads, shape, samples)

    def row_bytes(self) -> int:
        """Memory that the explicit gradient of one row takes while it is made, its sample's patches included."""
        patches = self._positions * self._shape.groups * self._shape.weight_shape[1:].numel()
        return super().row_bytes() + (patches * self._x.itemsize if self._weight is not None else 0)

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """``J^T w``: a sum over the rows of a sample, then the layer's weight gradient."""
        w = weights.view(self.num_samples, -1).repeat_interleave(self._merged, 0)
        g = weighted_sum(self._g, w.flatten())
        record = ConvRecord(self._weight, self._bias, self._x, g, self._shape, self.num_samples)
        return dict(zip(self.names, record.summed(), strict=True))

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """Inner products of the output gradients with one convolution by ``v``."""
        moved = self._g.new_zeros(self._g[:, 0].shape)
        if self._weight is not None:
            moved = self._shape.forward(self._x, vector[self._weight].to(self._x.dtype), None)
        if self._bias is not None:
            moved = moved + vector[self._bias].to(self._x.dtype).view(-1, *[1] * (moved.ndim - 2))
        products = torch.bmm(self._g.flatten(2), moved.flatten(1).unsqueeze(2))
        return products.view(self.num_samples, self._merged, -1).sum(1).flatten()

    def rowwise(self) -> ConvRecord:
        """As a record of R single rows, its images repeated."""
        x = self._x.unflatten(0, (self.num_samples, 1, -1)).expand(-1, self.num_components, *[-1] * self._x.ndim)
        g = self._g.unflatten(0, (self.num_samples, -1)).transpose(1, 2)
        return ConvRecord(self._weight, self._bias, x.flatten(0, 2), g.flatten(0, 2), self._shape, self.num_rows)

    def samples(self, chosen: slice) -> "ConvVectorRecord":
        """Keep some samples."""
        start, stop, _ = chosen.indices(self.num_samples)
        images = slice(start * self._merged, stop * self._merged)
        x, g = self._x[images], self._g[images]
        return ConvVectorRecord(self._weight, self._bias, x, g, self._shape, stop - start)

    def restrict(self, index: Mapping[str, Tensor]) -> Record:
        """Keep some output channels; of a grouped convolution as explicit gradients."""
        if self._shape.groups > 1:
            return self.materialize().restrict(index)
        kept = index[self.names[0]]
        shape = replace(self._shape, weight_shape=torch.Size([len(kept), *self._shape.weight_shape[1:]]))
        g = self._g.index_select(2, kept)
        return ConvVectorRecord(self._weight, self._bias, self._x, g, shape, self.num_samples)

    def concat_rows(self, others: Sequence[Self]) -> "ConvVectorRecord | None":
        """Stack samples of equal image sizes, numbers of images and numbers of rows."""
        parts = [self, *others]
        if len({(p.names, p._shape, p._x.shape[1:], p._merged, p.num_components) for p in parts}) > 1:
            return None
        x, g = torch.cat([p._x for p in parts]), torch.cat([p._g for p in parts])
        samples = sum(p.num_samples for p in parts)
        return ConvVectorRecord(self._weight, self._bias, x, g, self._shape, samples)

    def concat_shared(self, other: Self) -> "ConvVectorRecord | None":
        """A second use on images of the same size is more images to a sample."""
        if (self.names, self._shape, self._x.shape[1:]) != (other.names, other._shape, other._x.shape[1:]):
            return None

        def join(mine: Tensor, theirs: Tensor) -> Tensor:
            parts = [t.unflatten(0, (self.num_samples, -1)) for t in (mine, theirs)]
            return torch.cat(parts, 1).flatten(0, 1)

        x, g = join(self._x, other._x), join(self._g, other._g)
        return ConvVectorRecord(self._weight, self._bias, x, g, self._shape, self.num_samples)
