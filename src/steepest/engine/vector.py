"""Records of vector rows: K rows to a sample, which share what the layer saw of it and differ in output gradients."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.engine.linear import LinearRecord, factorized_weight
from steepest.engine.records import (
    CHUNK_BYTES,
    KroneckerFactors,
    Record,
    accumulate,
    accumulate_cross,
    column_chunks,
    common_dtype,
)
from steepest.linalg.factors import product
from steepest.linalg.outer import outer

__all__ = ["LinearVectorRecord", "VectorRecord", "vector_is_cheaper_factorized", "weighted_sum"]


class VectorRecord(Record):
    """Rows (n, k) of samples n, ordered sample by sample: row ``n K + k``.

    Attributes:
        num_samples: Number of samples B.
        num_components: Rows K of each of them; R is B K.
    """

    num_samples: int
    num_components: int

    @abstractmethod
    def rowwise(self) -> Record:
        """The same rows with a copy of the inputs for each: for what has no form of its own here."""

    @abstractmethod
    def samples(self, chosen: slice) -> Self:
        """Keep some samples: views, nothing is copied."""

    def take(self, rows: slice) -> Record:
        """Keep some rows; of samples that are cut apart as a record of single rows."""
        start, stop, _ = rows.indices(self.num_rows)
        first, last = start // self.num_components, -(-stop // self.num_components)
        kept = self.samples(slice(first, last))
        if kept.num_rows == stop - start:
            return kept
        offset = first * self.num_components
        return kept.rowwise().take(slice(start - offset, stop - offset))

    def kronecker_factors(self, sharing: Sharing) -> KroneckerFactors | None:
        """Every row counts as a sample of its own."""
        return self.rowwise().kronecker_factors(sharing)

    def positions(self, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Inputs and output gradients row by row."""
        return self.rowwise().positions(sharing)


class LinearVectorRecord(VectorRecord):
    """Inputs and output gradients of a linear layer; every input is there once, for all rows of its sample.

    Args:
        weight: Qualified name of the weight ``[d_out, d_in]``, or None if it is not differentiated.
        bias: Qualified name of the bias ``[d_out]``, or None.
        inputs: ``[B, S, d_in]``.
        output_grads: ``[B, K, S, d_out]``.
    """

    def __init__(self, weight: str | None, bias: str | None, inputs: Tensor, output_grads: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._x, self._g = common_dtype(inputs, output_grads)
        self._like = self._g
        self.names = tuple(name for name in (weight, bias) if name is not None)
        self.num_samples, self.num_components = output_grads.shape[:2]
        self.num_rows = self.num_samples * self.num_components
        d_in, d_out = inputs.shape[-1], output_grads.shape[-1]
        sizes = {weight: torch.Size([d_out, d_in]), bias: torch.Size([d_out])}
        self.shapes = {name: sizes[name] for name in self.names}

    def per_sample_grads(self) -> dict[str, Tensor]:
        """``g_nk^T x_n`` and ``sum_s g_nks``."""
        grads = {}
        if self._weight is not None:
            grads[self._weight] = self._weight_grads(slice(None)).view(self.num_rows, *self.shapes[self._weight])
        if self._bias is not None:
            grads[self._bias] = self._bias_grads()
        return grads

    def _weight_grads(self, outputs: slice) -> Tensor:
        """``[B K, outputs * d_in]``: one product for all rows of a sample."""
        g = self._g[..., outputs].transpose(2, 3).flatten(1, 2)
        return torch.bmm(g, self._x).view(self.num_rows, -1)

    def _bias_grads(self) -> Tensor:
        return self._g.sum(2).flatten(0, 1)

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T`` in the cheaper of the factorised and the materialised form; ``X X^T`` is formed for samples."""
        if self._weight is not None and self._x.shape[1] == 1:
            inner = outer(self._x[:, 0].to(dtype))
            if self._bias is not None:
                inner += 1
            gram = outer(self._g[:, :, 0].flatten(0, 1).to(dtype))
            by_sample = gram.view(self.num_samples, self.num_components, self.num_samples, self.num_components)
            by_sample.mul_(inner[:, None, :, None])
            return gram
        if self._weight is not None and self._factorized_is_cheaper(self):
            return self._factorized(self, dtype, min(max_memory, CHUNK_BYTES))
        gram = self._g.new_zeros(self.num_rows, self.num_rows, dtype=dtype)
        limit = min(max_memory, CHUNK_BYTES)
        for outputs in self._output_chunks(self.num_rows, dtype, limit):
            accumulate(gram, self._weight_grads(outputs), limit)
        if self._bias is not None:
            accumulate(gram, self._bias_grads(), limit)
        return gram

    def cross_gram(self, other: Record, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J K^T`` in the cheaper of the factorised and the materialised form, with single rows too."""
        if isinstance(other, LinearRecord):
            options, (x, g) = other.parts()
            other = LinearVectorRecord(options[0], options[1], x, g.unsqueeze(1))
        if not isinstance(other, LinearVectorRecord) or other.parts()[0] != self.parts()[0]:
            return super().cross_gram(other, dtype, max_memory)
        limit = min(max_memory, CHUNK_BYTES)
        if self._weight is not None and self._factorized_is_cheaper(other):
            return self._factorized(other, dtype, limit)
        gram = self._g.new_zeros(self.num_rows, other.num_rows, dtype=dtype)
        for outputs in self._output_chunks(self.num_rows + other.num_rows, dtype, limit):
            accumulate_cross(gram, self._weight_grads(outputs), other._weight_grads(outputs), limit)
        if self._bias is not None:
            accumulate_cross(gram, self._bias_grads(), other._bias_grads(), limit)
        return gram

    def _output_chunks(self, rows: int, dtype: torch.dtype, limit: int) -> Sequence[slice]:
        """Which output features of the explicit gradients of so many rows fit at a time."""
        if self._weight is None:
            return []
        column = rows * self._x.shape[2] * (dtype.itemsize + self._x.itemsize)
        return list(column_chunks(self._g.shape[3], column, limit))

    def _factorized_is_cheaper(self, other: "LinearVectorRecord") -> bool:
        sizes = [(r.num_samples, r.num_rows, r._x.shape[1]) for r in (self, other)]
        return vector_is_cheaper_factorized(sizes[0], sizes[1], self._x.shape[2], self._g.shape[3])

    def _factorized(self, other: "LinearVectorRecord", dtype: torch.dtype, limit: int) -> Tensor:
        """``sum_st (x_ns . y_mt + 1) (g_nks . h_mlt)``, the 1 for the bias; some samples at a time."""
        y, h = other._x.flatten(0, 1).to(dtype), other._g.flatten(0, 2).to(dtype)
        gram = y.new_empty(self.num_samples, self.num_components, other.num_rows)
        shared, theirs = self._x.shape[1], other._x.shape[1]
        row_bytes = 2 * self.num_components * shared * len(h) * dtype.itemsize
        for chunk in column_chunks(self.num_samples, row_bytes, limit):
            inner = self._x[chunk].flatten(0, 1).to(dtype) @ y.T
            if self._bias is not None:
                inner += 1
            products = self._g[chunk].flatten(0, 2).to(dtype) @ h.T
            products = products.view(-1, self.num_components, shared, other.num_samples, other.num_components, theirs)
            products *= inner.view(-1, 1, shared, other.num_samples, 1, theirs)
            gram[chunk] = products.sum((2, 5)).flatten(2)
        return gram.flatten(0, 1)

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Names; inputs and output gradients."""
        return (self._weight, self._bias), (self._x, self._g)

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "LinearVectorRecord":
        """Join them again."""
        return LinearVectorRecord(*options, *tensors)

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """``J^T w``: a sum over the rows of a sample, then one matrix product."""
        return dict(zip(self.names, self._weighted(weights).summed(), strict=True))

    def _weighted(self, weights: Tensor) -> LinearRecord:
        """One row for each sample, the weighted sum of its rows."""
        g = weighted_sum(self._g, weights)
        return LinearRecord(self._weight, self._bias, self._x, g)

    def add_vjp_(self, targets: Mapping[str, Tensor], weights: Tensor, alphas: Mapping[str, float]) -> None:
        """The same product, accumulated where it is wanted."""
        self._weighted(weights).add_vjp_(targets, weights.new_ones(self.num_samples), alphas)

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """``sum_s g_nks . (V x_ns + v_b)``, with one product V x for each sample."""
        samples, _, shared, d_out = self._g.shape
        moved = self._g.new_zeros(samples, shared, d_out)
        if self._weight is not None:
            moved = self._x @ vector[self._weight].to(self._x.dtype).T
        if self._bias is not None:
            moved = moved + vector[self._bias].to(self._x.dtype)
        return torch.bmm(self._g.flatten(2), moved.flatten(1).unsqueeze(2)).flatten()

    def project(self, vectors: Mapping[str, Tensor], max_memory: int) -> Tensor:
        """``g_nk^T V_l x_n`` where there is one position; else products of explicit gradients."""
        d_in, d_out = self._x.shape[2], self._g.shape[3]
        if self._weight is None or self._x.shape[1] > 1 or len(vectors[self._weight]) >= max(d_in, d_out):
            return super().project(vectors, max_memory)
        weight = vectors[self._weight].to(self._g.dtype)
        out = self._g.new_empty(self.num_samples, self.num_components, len(weight))
        row_bytes = len(weight) * d_out * self._g.itemsize
        for chunk in column_chunks(self.num_samples, row_bytes, min(max_memory, CHUNK_BYTES)):
            moved = (self._x[chunk, 0] @ weight.flatten(0, 1).T).view(-1, len(weight), d_out)
            if self._bias is not None:
                moved = moved + vectors[self._bias].to(moved.dtype)
            out[chunk] = torch.bmm(self._g[chunk, :, 0], moved.mT)
        return out.flatten(0, 1)

    def squared_norms(self, max_memory: int) -> Tensor:
        """``(|x_n|^2 + 1) |g_nk|^2`` where there is one position."""
        if self._weight is None or self._x.shape[1] > 1:
            return super().squared_norms(max_memory)
        x = torch.linalg.vector_norm(self._x[:, 0], dim=1, dtype=torch.float64).square()
        g = torch.linalg.vector_norm(self._g[:, :, 0], dim=2, dtype=torch.float64).square()
        return torch.mul((x + 1 if self._bias is not None else x).unsqueeze(1), g).flatten()

    def whitened(self, input_root: Tensor, grad_root: Tensor) -> Record:
        """Inputs and output gradients times the roots."""
        if self._weight is None:
            return self
        x = self._x if self._bias is None else torch.cat([self._x, self._x.new_ones(*self._x.shape[:2], 1)], 2)
        g = product(self._g, grad_root.to(self._g))
        return LinearVectorRecord(self._weight, None, product(x, input_root.to(x)), g)

    def rowwise(self) -> LinearRecord:
        """As a record of R single rows, its inputs repeated."""
        x = self._x.repeat_interleave(self.num_components, 0)
        return LinearRecord(self._weight, self._bias, x, self._g.flatten(0, 1))

    def samples(self, chosen: slice) -> "LinearVectorRecord":
        """Keep some samples."""
        return LinearVectorRecord(self._weight, self._bias, self._x[chosen], self._g[chosen])

    def restrict(self, index: Mapping[str, Tensor]) -> "LinearVectorRecord":
        """Keep some output features."""
        kept = self._g.index_select(3, index[self.names[0]])
        return LinearVectorRecord(self._weight, self._bias, self._x, kept)

    def concat_rows(self, others: Sequence[Self]) -> "LinearVectorRecord | None":
        """Stack samples of equal numbers of positions and rows."""
        parts = [self, *others]
        if len({(p._weight, p._bias, p._x.shape[1:], p._g.shape[1:]) for p in parts}) > 1:
            return None
        x, g = torch.cat([p._x for p in parts]), torch.cat([p._g for p in parts])
        return LinearVectorRecord(self._weight, self._bias, x, g)

    def concat_shared(self, other: Self) -> "LinearVectorRecord | None":
        """A second use is more positions: cross terms come by themselves."""
        if (self._weight, self._bias) != (other._weight, other._bias):
            return None
        x, g = torch.cat([self._x, other._x], 1), torch.cat([self._g, other._g], 2)
        return LinearVectorRecord(self._weight, self._bias, x, g)


def vector_is_cheaper_factorized(
    left: tuple[int, int, int], right: tuple[int, int, int], features_in: int, features_out: int
) -> bool:
    """Choose between the two forms of the products of a layer's vector rows with others.

    Args:
        left: Numbers of samples, of rows and of positions that share the weight, on one side.
        right: The same on the other side.
        features_in: Input features.
        features_out: Output features.

    Returns:
        As `cross_is_cheaper_factorized`; products of inputs are formed for samples and not for rows.
    """
    shared = left[2] * right[2]
    factorized = shared * (left[0] * right[0] * (features_in + 1) + left[1] * right[1] * (features_out + 1))
    formed = left[1] * left[2] + right[1] * right[2]
    materialized = features_in * features_out * (formed + left[1] * right[1])
    return shared == 1 or factorized_weight(factorized) < materialized


def weighted_sum(grads: Tensor, weights: Tensor) -> Tensor:
    """Add up the rows of every sample with weights.

    Args:
        grads: ``[B, K, ...]``.
        weights: ``[B K]``.

    Returns:
        ``[B, ...]``.
    """
    samples, components = grads.shape[:2]
    w = weights.to(grads.dtype).view(samples, 1, components)
    summed: Tensor = torch.bmm(w, grads.flatten(2)).view([samples, *grads.shape[2:]])
    return summed
