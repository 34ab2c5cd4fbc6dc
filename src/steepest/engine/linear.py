"""Records of linear maps ``z = W x + b``, the family that carries nearly all parameters."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from steepest._typing import Sharing
from steepest.engine.cross import explicit_cross, factorized_cross
from steepest.engine.layout import Layout
from steepest.engine.records import (
    CHUNK_BYTES,
    KroneckerFactors,
    Record,
    accumulate,
    column_chunks,
    common_dtype,
    factors_of,
)
from steepest.engine.tape import Slot, Tape, Use, function_name, refusal
from steepest.linalg.factors import product
from steepest.linalg.outer import outer

__all__ = [
    "LinearRecord",
    "LinearUse",
    "cross_is_cheaper_factorized",
    "factorized_is_cheaper",
    "factorized_weight",
    "linear",
]

# Measured by benchmarks/gram_forms.py: one multiply-add of the factorised form costs this many of the materialised
# form's, which writes every per-sample gradient to memory and reads it back.
_FACTORIZED_COST = 0.6


def factorized_weight(operations: int) -> float:
    """How many operations of the materialised form cost what so many of the factorised form do."""
    return _FACTORIZED_COST * operations


def factorized_is_cheaper(rows: int, shared: int, features_in: int, features_out: int) -> bool:
    """Choose between the two forms of a layer's Gram by their operation counts.

    Args:
        rows: Number of rows R.
        shared: Positions S that share the weight.
        features_in: Input features.
        features_out: Output features.

    Returns:
        True where ``(x_ns . x_mt)(g_ns . g_mt)`` summed over positions costs less than per-sample gradients and
        their products.
    """
    factorized = rows * rows * shared * shared * (features_in + features_out + 2)
    materialized = features_in * features_out * rows * (shared + rows)
    return factorized_weight(factorized) < materialized


def cross_is_cheaper_factorized(
    rows: tuple[int, int], shared: tuple[int, int], features_in: int, features_out: int
) -> bool:
    """Choose between the two forms of the products of a layer's rows with other rows.

    Args:
        rows: Number of rows on both sides.
        shared: Positions on both sides that share the weight.
        features_in: Input features.
        features_out: Output features.

    Returns:
        As `factorized_is_cheaper`, where both sides are the same; always True without shared positions.
    """
    factorized = rows[0] * rows[1] * shared[0] * shared[1] * (features_in + features_out + 2)
    formed = rows[0] * shared[0] + rows[1] * shared[1]
    materialized = features_in * features_out * (formed + rows[0] * rows[1])
    return shared == (1, 1) or factorized_weight(factorized) < materialized


class LinearRecord(Record):
    """Inputs and output gradients of a linear layer.

    Args:
        weight: Qualified name of the weight ``[d_out, d_in]``, or None if it is not differentiated.
        bias: Qualified name of the bias ``[d_out]``, or None.
        inputs: ``[R, S, d_in]``.
        output_grads: ``[R, S, d_out]``.
    """

    def __init__(self, weight: str | None, bias: str | None, inputs: Tensor, output_grads: Tensor) -> None:
        self._weight, self._bias = weight, bias
        self._x, self._g = common_dtype(inputs, output_grads)
        self._like = self._g
        self.names = tuple(name for name in (weight, bias) if name is not None)
        self.num_rows = inputs.shape[0]
        d_in, d_out = inputs.shape[-1], output_grads.shape[-1]
        sizes = {weight: torch.Size([d_out, d_in]), bias: torch.Size([d_out])}
        self.shapes = {name: sizes[name] for name in self.names}

    def per_sample_grads(self) -> dict[str, Tensor]:
        """``g_n^T x_n`` and ``sum_s g_ns``."""
        grads = {}
        if self._weight is not None:
            grads[self._weight] = torch.bmm(self._g.transpose(1, 2), self._x)
        if self._bias is not None:
            grads[self._bias] = self._g.sum(1)
        return grads

    def gram(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J J^T`` in the cheaper of the factorised and the materialised form."""
        rows, shared, d_in = self._x.shape
        if self._weight is None:
            g = self._g.sum(1).to(dtype)
            return g @ g.T
        if shared == 1:
            x, g = self._x[:, 0].to(dtype), self._g[:, 0].to(dtype)
            gram = outer(x)
            if self._bias is not None:
                gram += 1
            return gram.mul_(outer(g))
        if factorized_is_cheaper(rows, shared, d_in, self._g.shape[-1]):
            return self._factorized(dtype, max_memory)
        return self._materialized(dtype, max_memory)

    def _factorized(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        rows, shared, _ = self._x.shape
        x, g = self._x.flatten(0, 1).to(dtype), self._g.flatten(0, 1).to(dtype)
        gram = x.new_empty(rows, rows)
        for chunk in column_chunks(rows, 2 * shared * shared * rows * dtype.itemsize, min(max_memory, CHUNK_BYTES)):
            span = slice(chunk.start * shared, chunk.stop * shared)
            products = x[span] @ x.T
            if self._bias is not None:
                products += 1
            products *= g[span] @ g.T
            gram[chunk] = products.view(-1, shared, rows, shared).sum((1, 3))
        return gram

    def _materialized(self, dtype: torch.dtype, max_memory: int) -> Tensor:
        # Per-sample gradients are formed in the activations' own precision: that perturbs J itself by its
        # rounding. Only the products of J with itself, where small singular values drown, need `dtype`.
        rows, _, d_in = self._x.shape
        gram = self._x.new_zeros(rows, rows, dtype=dtype)
        limit = min(max_memory, CHUNK_BYTES)
        for outputs in column_chunks(self._g.shape[-1], rows * d_in * (dtype.itemsize + self._x.itemsize), limit):
            grads = torch.bmm(self._g[:, :, outputs].transpose(1, 2), self._x)
            accumulate(gram, grads.view(rows, -1), max_memory)
        if self._bias is not None:
            accumulate(gram, self._g.sum(1), max_memory)
        return gram

    def cross_gram(self, other: Record, dtype: torch.dtype, max_memory: int) -> Tensor:
        """``J K^T`` in the cheaper of the factorised and the materialised form."""
        if not isinstance(other, LinearRecord) or other.parts()[0] != self.parts()[0]:
            return super().cross_gram(other, dtype, max_memory)
        if self._weight is None:
            return self._g.sum(1).to(dtype) @ other._g.sum(1).to(dtype).T
        limit, bias = min(max_memory, CHUNK_BYTES), self._bias is not None
        rows, shared = (self.num_rows, other.num_rows), (self._x.shape[1], other._x.shape[1])
        cheaper = cross_is_cheaper_factorized(rows, shared, self._x.shape[2], self._g.shape[2])
        form = factorized_cross if cheaper else explicit_cross
        return form((self._x, self._g), (other._x, other._g), bias, dtype, limit)

    def parts(self) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
        """Names; inputs and output gradients."""
        return (self._weight, self._bias), (self._x, self._g)

    @classmethod
    def of_parts(cls, options: tuple[Any, ...], tensors: Sequence[Tensor]) -> "LinearRecord":
        """Join them again."""
        return LinearRecord(*options, *tensors)

    def vjp(self, weights: Tensor) -> dict[str, Tensor]:
        """``(diag(w) G)^T X``: one matrix product."""
        grads = {name: self._g.new_zeros(shape) for name, shape in self.shapes.items()}
        self.add_vjp_(grads, weights, dict.fromkeys(self.names, 1.0))
        return grads

    def add_vjp_(self, targets: Mapping[str, Tensor], weights: Tensor, alphas: Mapping[str, float]) -> None:
        """The same product, accumulated where it is wanted."""
        if any(targets[name].dtype != self._g.dtype for name in self.names):
            super().add_vjp_(targets, weights, alphas)
            return
        w = weights.to(self._g.dtype)
        if self._weight is not None:
            x, g = self._x, self._g
            if x.shape[-1] < g.shape[-1]:  # weight the smaller factor
                x = x * w.view(-1, 1, 1)
            else:
                g = g * w.view(-1, 1, 1)
            x, g = x.reshape(-1, x.shape[-1]), g.reshape(-1, g.shape[-1])
            targets[self._weight].addmm_(g.T, x, alpha=alphas[self._weight])
        if self._bias is not None:
            g = self._g[:, 0] if self._g.shape[1] == 1 else self._g.sum(1)
            targets[self._bias].addmv_(g.T, w, alpha=alphas[self._bias])

    def jvp(self, vector: Mapping[str, Tensor]) -> Tensor:
        """``sum_s g_ns . (V x_ns + v_b)``."""
        moved = self._g.new_zeros(())
        if self._weight is not None:
            moved = self._x @ vector[self._weight].to(self._x.dtype).T
        if self._bias is not None:
            moved = moved + vector[self._bias].to(self._x.dtype)
        return (moved * self._g).sum((1, 2))

    def project(self, vectors: Mapping[str, Tensor], max_memory: int) -> Tensor:
        """``g_n^T V_l x_n`` where there is one position; else S times the products of explicit gradients."""
        d_in, d_out = self._x.shape[2], self._g.shape[2]
        if self._weight is None or self._x.shape[1] > 1:
            return super().project(vectors, max_memory)
        weight = vectors[self._weight].to(self._g.dtype)
        if len(weight) >= max(d_in, d_out):  # V_l x_n of all l would take more memory than the gradient of row n
            return super().project(vectors, max_memory)
        out = self._g.new_empty(self.num_rows, len(weight))
        row_bytes = len(weight) * min(d_in, d_out) * self._g.itemsize
        for rows in column_chunks(self.num_rows, row_bytes, min(max_memory, CHUNK_BYTES)):
            x, g = self._x[rows, 0], self._g[rows, 0]
            if d_out <= d_in:
                moved = (x @ weight.flatten(0, 1).T).view(len(x), len(weight), d_out)
                out[rows] = torch.bmm(moved, g.unsqueeze(2)).squeeze(2)
            else:
                out[rows] = torch.matmul(g, weight).mul_(x).sum(2).T
        if self._bias is not None:
            out.addmm_(self._g[:, 0], vectors[self._bias].to(self._g.dtype).T)
        return out

    def squared_norms(self, max_memory: int) -> Tensor:
        """``(|x_n|^2 + 1) |g_n|^2`` where there is one position."""
        if self._weight is None or self._x.shape[1] > 1:
            return super().squared_norms(max_memory)
        x, g = (torch.linalg.vector_norm(t[:, 0], dim=1, dtype=torch.float64).square() for t in (self._x, self._g))
        return torch.mul(x + 1 if self._bias is not None else x, g)

    def kronecker_factors(self, sharing: Sharing) -> KroneckerFactors | None:
        """Every position a sample of its own ("expand"), or mean input and summed gradient ("reduce")."""
        if self._weight is None:
            return None
        x, g = (part.flatten(0, 1) for part in self.positions(sharing))
        return factors_of([(x.T, g.T)], len(x), self.num_rows)

    def positions(self, sharing: Sharing) -> tuple[Tensor, Tensor]:
        """Inputs with a 1 joined for the bias ``[R, S, d_in (+ 1)]`` and output gradients ``[R, S, d_out]``."""
        x, g = self._x, self._g
        if self._bias is not None:
            x = torch.cat([x, x.new_ones(*x.shape[:2], 1)], 2)
        return (x.mean(1, keepdim=True), g.sum(1, keepdim=True)) if sharing == "reduce" else (x, g)

    def whitened(self, input_root: Tensor, grad_root: Tensor) -> Record:
        """Inputs and output gradients times the roots."""
        if self._weight is None:
            return self
        x, g = self.positions("expand")
        return LinearRecord(self._weight, None, product(x, input_root.to(x)), product(g, grad_root.to(g)))

    def summed(self) -> tuple[Tensor, ...]:
        """``G^T X``, and the sum of G."""
        grads = () if self._weight is None else (self._g.flatten(0, 1).T @ self._x.flatten(0, 1),)
        return grads if self._bias is None else (*grads, self._g.sum((0, 1)))

    def take(self, rows: slice) -> "LinearRecord":
        """Keep some rows: views, nothing is copied."""
        return LinearRecord(self._weight, self._bias, self._x[rows], self._g[rows])

    def restrict(self, index: Mapping[str, Tensor]) -> "LinearRecord":
        """Keep some output features."""
        return LinearRecord(self._weight, self._bias, self._x, self._g.index_select(2, index[self.names[0]]))

    def concat_rows(self, others: Sequence[Self]) -> Self | None:
        """Stack rows of equal numbers of positions."""
        parts = [self, *others]
        if len({(p._weight, p._bias, p._x.shape[1], p._g.shape[-1]) for p in parts}) > 1:
            return None
        return type(self)(self._weight, self._bias, torch.cat([p._x for p in parts]), torch.cat([p._g for p in parts]))

    def concat_shared(self, other: Self) -> Self | None:
        """A second use is more positions: cross terms come by themselves."""
        if (self._weight, self._bias) != (other._weight, other._bias):
            return None
        return type(self)(
            self._weight, self._bias, torch.cat([self._x, other._x], 1), torch.cat([self._g, other._g], 1)
        )


class LinearUse(Use):
    """A call of `F.linear`."""

    def __init__(self, tape: Tape, x: Tensor, weight: Slot | None, bias: Slot | None, out: Tensor) -> None:
        slots = tuple(slot for slot in (weight, bias) if slot is not None)
        super().__init__(tape, "linear", slots, out, x, num_lead=x.ndim - 1)
        self._weight, self._bias = weight, bias

    def record(self, output_grads: Tensor, layout: Layout, rows: int) -> Record:
        """Bring inputs and output gradients to canonical layout."""
        x, g = (layout.canonical(t, self.num_lead) for t in (self.inputs, output_grads))
        return self._settle(LinearRecord(self._key(self._weight), self._key(self._bias), x, g))


def linear(tape: Tape, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002
    """Rule of `F.linear`."""
    w, b = tape.trained(weight), tape.trained(bias)
    slots = [slot for slot in (w, b) if slot is not None]
    if input.ndim < 2:
        raise refusal(
            function_name(func),
            slots,
            "its input has no batch dimension",
            "pass the model a batch, even of one sample",
        )
    out: Tensor = func(input, w.leaf() if w else weight, b.leaf() if b else bias)
    tape.uses.append(LinearUse(tape, input, w, b, out))
    return out
